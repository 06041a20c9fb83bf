"""HyperExperts: small modules generated from the identity of the experts a token did not choose.

Equations: HyperMoE (Zhao et al., ACL 2024, arXiv 2402.12656); docs/METHOD.md numbers them.

Shape legend:
    T tokens, D hidden size, N experts, K experts chosen for a token, U sets of experts,
    E expert-embedding size, P selection hidden size, H hypernetwork input size,
    B bottleneck, A adapter size, J HyperExperts that a token takes, R = T * J rows.
"""

import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .configuration_hypermoe import HyperConditioning
from .generated import Assignment, HyperExpertWeights, RoutedRows, apply_generated, sort_rows
from .hyper_cache import KeptHyperExperts
from .hyper_costs import Form, Sizes, cheaper_form, generated_weights_fit
from .selections import all_sets, distinct_sets, rank_sets

_LOGGER = logging.getLogger(__name__)


def keep_initialisation(part: nn.Module) -> None:
    """Have the model initialise the modules in `part` as their own `reset_parameters` says.

    Transformers initialises every Linear and Embedding of a model alike, which would make the
    generated weights ten to thirty times too large and the expert embeddings fifty times too small.
    """
    for module in part.modules():
        module.keeps_initialisation = True  # type: ignore[assignment]


class SelectionEncoder(nn.Module):
    """Encodes which experts were not selected (steps 2 and 3), one encoder a layer.

    Args:
        num_experts: N.
        embedding_size: E.
        hidden_size: P.
        output_size: H.
    """

    def __init__(self, num_experts: int, embedding_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.expert_embedding = nn.Embedding(num_experts, embedding_size)
        self.mlp = nn.Sequential(nn.Linear(embedding_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, output_size))
        keep_initialisation(self)

    def forward(self, selected_UK: Tensor) -> Tensor:
        """Encode selections.

        Args:
            selected_UK: expert indices; their order inside a row does not matter.

        Returns:
            z_UH. For K = N the sum over unselected experts is exactly zero.
        """
        # Through the embedding's own forward, where a sharded table is gathered.
        table_NE = self.expert_embedding(torch.arange(self.num_experts, device=selected_UK.device))
        unselected_UN = table_NE.new_ones(selected_UK.shape[0], table_NE.shape[0]).scatter(1, selected_UK, 0.0)
        # One GEMM with a 0/1 matrix: exactly zero for K = N, the same bits whatever the order of
        # the K, and a gradient without atomics. Its 2*U*N*E FLOPs are nothing beside step 5.
        encoded: Tensor = self.mlp(unselected_UN @ table_NE)
        return encoded


class GeneratorHead(nn.Linear):
    """Linear map from the bottleneck to generated weights or biases, with the published initialisation.

    Generated weights start at about 1e-5 (D = 768), so HyperExpert(x) is about zero.

    Args:
        bottleneck: B.
        generated: numbers to generate.
        fan_in: inputs of the generated matrix; 1 for a generated bias.
    """

    def __init__(self, bottleneck: int, generated: int, fan_in: int = 1) -> None:
        self.bound = 1e-3 * math.sqrt(3 / (bottleneck * fan_in))
        super().__init__(bottleneck, generated)

    def reset_parameters(self) -> None:
        """Uniform weights within +-1e-3 * sqrt(3 / (B * fan_in)), zero biases."""
        nn.init.uniform_(self.weight, -self.bound, self.bound)
        nn.init.zeros_(self.bias)


class HyperNetwork(nn.Module):
    """The one hypernetwork shared by all layers and experts (steps 4 to 6).

    Its parameters are read inside its own forward only, so that a sharded copy can be gathered for it, and those of
    each map by calling the map, which may be adapted, quantised or offloaded. `_factored` alone reads weights itself,
    of maps that are none of these.

    Args:
        hidden_size: D.
        input_size: H.
        num_layers: L, the layers that use it.
        layer_embedding_size: width of the layer embedding.
        bottleneck_size: B.
        adapter_size: A.
    """

    def __init__(
        self,
        hidden_size: int,
        input_size: int,
        num_layers: int,
        layer_embedding_size: int,
        bottleneck_size: int,
        adapter_size: int,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.adapter_size = adapter_size
        self.bottleneck_size = bottleneck_size
        self.layer_embedding = nn.Embedding(num_layers, layer_embedding_size)
        self.trunk = nn.Linear(input_size + layer_embedding_size, bottleneck_size)
        self.down_weight = GeneratorHead(bottleneck_size, hidden_size * adapter_size, fan_in=hidden_size)
        self.down_bias = GeneratorHead(bottleneck_size, adapter_size)
        self.up_weight = GeneratorHead(bottleneck_size, adapter_size * hidden_size, fan_in=adapter_size)
        self.up_bias = GeneratorHead(bottleneck_size, hidden_size)
        keep_initialisation(self)

    @property
    def sizes(self) -> Sizes:
        """D, A and B, for the cost model."""
        return Sizes(self.hidden_size, self.adapter_size, self.bottleneck_size)

    def forward(
        self,
        z_UH: Tensor,
        layer_U: Tensor,
        x_TD: Tensor | None = None,
        assignment: Assignment | None = None,
        form: Form = "per_set",
        recompute: bool = False,
    ) -> HyperExpertWeights | Tensor:
        """Generate a HyperExpert for each of U encoded sets and, given tokens, apply them.

        Args:
            z_UH: encoded sets.
            layer_U: the layer of each.
            x_TD: input of the MoE block; None generates only.
            taken: which of the U HyperExperts each token takes.
            form: "per_set", "factored" or "per_token"; all three are exact.
            recompute: generate "per_set" modules again in the backward pass instead of keeping them.

        Returns:
            y_TD or, without tokens, the generated weights.
        """
        u_UB = torch.relu(self.trunk(torch.cat([z_UH, self.layer_embedding(layer_U)], dim=-1)))
        if x_TD is None or assignment is None:
            return self._generate(u_UB)
        if form == "per_set":
            if recompute and torch.is_grad_enabled():
                rows = sort_rows(assignment, (len(u_UB), self.hidden_size, self.adapter_size), u_UB)
                # Of this module's insides alone: its own forward, where parameters are gathered, runs once.
                y_TD: Tensor = checkpoint(self._per_set, x_TD, assignment, u_UB, rows, use_reentrant=False)
                return y_TD
            return self._per_set(x_TD, assignment, u_UB)
        x_RD = x_TD.repeat_interleave(assignment.sets_TJ.shape[1], dim=0)
        u_RB = u_UB[assignment.sets_TJ.flatten()]
        if form == "per_token":
            return assignment.sum_over_rows(self._per_token(x_RD, u_RB))
        plain = _computes_its_weight(self.down_weight) and _computes_its_weight(self.up_weight)
        return assignment.sum_over_rows(self._factored(x_RD, u_RB) if plain else self._per_token_in_chunks(x_RD, u_RB))

    def _generate(self, u_UB: Tensor) -> HyperExpertWeights:
        """Step 5: one matrix product for all sets."""
        return HyperExpertWeights(
            self.down_weight(u_UB).view(-1, self.hidden_size, self.adapter_size),
            self.down_bias(u_UB),
            self.up_weight(u_UB).view(-1, self.adapter_size, self.hidden_size),
            self.up_bias(u_UB),
        )

    def _per_set(self, x_TD: Tensor, assignment: Assignment, u_UB: Tensor, rows: RoutedRows | None = None) -> Tensor:
        """Weights once per set, grouped matrix products over the tokens sorted by set."""
        return apply_generated(x_TD, assignment, self._generate(u_UB), rows)

    def _per_token(self, x_RD: Tensor, u_RB: Tensor) -> Tensor:
        """The equations as they stand: each row gets weights of its own. The reference for tests."""
        down_RDA, down_bias_RA, up_RAD, up_bias_RD = self._generate(u_RB)
        inner_RA = torch.relu(torch.einsum("rd,rda->ra", x_RD, down_RDA) + down_bias_RA)
        return torch.einsum("ra,rad->rd", inner_RA, up_RAD) + up_bias_RD

    def _per_token_in_chunks(self, x_RD: Tensor, u_RB: Tensor) -> Tensor:
        """`_per_token` in the place of `_factored`: as many FLOPs, but reads no weight itself.

        As many rows at a time as the maps have columns: their generated weights then take the memory of the maps.
        """
        if torch.compiler.is_compiling():
            return self._per_token(x_RD, u_RB)
        chunks = zip(*(torch.split(rows, self.bottleneck_size) for rows in (x_RD, u_RB)), strict=True)
        return torch.cat([checkpoint(self._per_token, x_rD, u_rB, use_reentrant=False) for x_rD, u_rB in chunks])

    def _factored(self, x_RD: Tensor, u_RB: Tensor) -> Tensor:
        """Contract x with the B basis matrices first, mix with u after: no generated weight exists."""
        D, A, B = self.hidden_size, self.adapter_size, u_RB.shape[1]
        basis_RAB = (x_RD @ self.down_weight.weight.view(D, A * B)).view(-1, A, B)
        down_RA = torch.bmm(basis_RAB, u_RB.unsqueeze(-1)).squeeze(-1)
        down_RA = down_RA + x_RD @ self.down_weight.bias.view(D, A) + self.down_bias(u_RB)
        inner_RA = torch.relu(down_RA)

        mixed_RAB = (inner_RA.unsqueeze(-1) * u_RB.unsqueeze(1)).view(-1, A * B)
        basis_ABD = self.up_weight.weight.view(A, D, B).transpose(1, 2).reshape(A * B, D)
        output_RD: Tensor = mixed_RAB @ basis_ABD + inner_RA @ self.up_weight.bias.view(A, D) + self.up_bias(u_RB)
        return output_RD


class SharedHyperNetwork:
    """The hypernetwork as an argument of the layers that call it.

    Not the module itself: accelerate moves every argument that it can to the layer's device, a module too, and fails
    where the module's weights are on disk.
    """

    def __init__(self, module: HyperNetwork) -> None:
        self._module = module

    @property
    def sizes(self) -> Sizes:
        """D, A and B."""
        return self._module.sizes

    def __call__(self, *args: Any) -> Any:
        """Call the module."""
        return self._module(*args)


def _computes_its_weight(head: nn.Module) -> bool:
    """Whether calling `head` computes nothing but its stored weight and bias.

    Not so with an adapter, a parametrization or a quantised weight (other types), where accelerate offloads it (a
    forward of its own) or where hooks may do anything.
    """
    return (
        type(head) is GeneratorHead
        and type(head.weight) is nn.Parameter
        and "forward" not in head.__dict__
        and not head._forward_pre_hooks
        and not head._forward_hooks
    )


class HyperExperts(nn.Module):
    """The HyperExperts of one layer: its selection encoder and its place in the hypernetwork.

    Args:
        encoder: this layer's `SelectionEncoder`.
        layer_index: this layer's row of the hypernetwork's layer embedding.
        conditioning: "selection", the paper's: a token takes one HyperExpert, generated from all experts
            but its own K. "route": it takes one for each of its experts j, generated from all experts
            but j, weighted by j's gate.
    """

    def __init__(
        self, encoder: SelectionEncoder, layer_index: int, conditioning: HyperConditioning = "selection"
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.layer_index = layer_index
        self.conditioning = conditioning
        self._announced = False

    def forward(
        self,
        x_TD: Tensor,
        selected_TK: Tensor,
        hypernetwork: HyperNetwork | SharedHyperNetwork,
        form: Form | Literal["auto"] = "auto",
        gates_TK: Tensor | None = None,
        generated: HyperExpertWeights | None = None,
        kept: KeptHyperExperts | None = None,
    ) -> Tensor:
        """HyperExpert(x) for every token (steps 2 to 6).

        Args:
            x_TD: input of the MoE block.
            selected_TK: the router's choice, distinct expert indices in any order.
            hypernetwork: the one shared by all layers.
            form: how to compute it. The forms agree to rounding; "auto" takes the cheaper of
                "per_set" and "factored".
            gates_TK: what the experts' outputs are weighted with; "route" needs them.
            generated: modules of all sets, if they were generated before.
            kept: where this call of `generate` keeps modules, if it does; without gradients only.

        Returns:
            y_TD, to be added to the experts' output.
        """
        tokens, set_size, sizes = selected_TK.shape[0], self.set_size(selected_TK.shape[1]), hypernetwork.sizes
        keeps = kept is not None and form == "auto" and not torch.is_grad_enabled()
        cache = kept.layer(self.layer_index, self.most_kept(sizes)) if kept is not None and keeps else None
        if generated is not None:
            self._announce("per_set", len(generated.up_bias), tokens, "generated with those of all layers")
            return apply_generated(x_TD, self._assign(selected_TK, gates_TK), generated)
        if self.knows_sets(tokens, set_size, sizes):
            z_UH, assignment = self.encode_all(set_size, x_TD.device), self._assign(selected_TK, gates_TK)
        elif torch.compiler.is_compiling():  # how many sets occur depends on data: one for each token
            z_UH, assignment = (
                self.encoder(selected_TK),
                Assignment(torch.arange(tokens, device=x_TD.device).unsqueeze(1)),
            )
            form = "factored" if form == "auto" else form
        else:
            sets_UK, set_of_token_T = distinct_sets(selected_TK, self.num_experts)
            assignment = Assignment(set_of_token_T.unsqueeze(1))
            if cache is not None and len(sets_UK) <= cache.capacity:
                weights = cache.fetch(sets_UK, lambda new_UK: self._generate(self.encoder(new_UK), hypernetwork))
                return apply_generated(x_TD, assignment, weights)
            z_UH = self.encoder(sets_UK)
        form, recompute = self._choose(form, assignment, z_UH.shape[0], set_size, sizes, x_TD)
        output: Tensor = hypernetwork(z_UH, self._layer_of(z_UH), x_TD, assignment, form, recompute)
        return output.to(x_TD.device)  # the hypernetwork may be on another

    @property
    def num_experts(self) -> int:
        """N."""
        return self.encoder.num_experts

    def set_size(self, top_k: int) -> int:
        """Experts that a HyperExpert is generated without: a token's K, or the one whose gate it takes."""
        return 1 if self.conditioning == "route" else top_k

    def knows_sets(self, tokens: int, set_size: int, sizes: Sizes) -> bool:
        """Whether modules of all sets there can be are made, so that nobody waits to learn which occur."""
        sets = math.comb(self.num_experts, set_size)
        if sets <= self.num_experts or torch.compiler.is_compiling():  # the tokens may be a symbol in a graph
            return sets <= self.num_experts
        return generated_weights_fit(tokens, sets, sizes)

    def encode_all(self, set_size: int, device: torch.device) -> Tensor:
        """All sets there can be, encoded; [C(N, set_size), H]."""
        z_UH: Tensor = self.encoder(all_sets(self.num_experts, set_size, device))
        return z_UH

    def _choose(
        self, form: Form | Literal["auto"], assignment: Assignment, sets: int, set_size: int, sizes: Sizes, x_TD: Tensor
    ) -> tuple[Form, bool]:
        """The form, and whether the backward pass generates modules again."""
        if torch.compiler.is_compiling():
            return ("per_set" if form == "auto" else form), False
        tokens, rows = x_TD.shape[0], assignment.sets_TJ.numel()
        # By the most sets there can be, not those that occur: all ranks then decide alike.
        recompute = not generated_weights_fit(tokens, min(tokens, math.comb(self.num_experts, set_size)), sizes)
        if form == "auto":
            form = cheaper_form(rows, sets, sizes, x_TD.device.type, x_TD.dtype)
            kept = "generated again in the backward pass" if recompute else "kept for the backward pass"
            self._announce(form, sets, tokens, kept if form == "per_set" else "none are made")
        return form, recompute

    def _assign(self, selected_TK: Tensor, gates_TK: Tensor | None) -> Assignment:
        return assign(selected_TK, gates_TK, self.num_experts, self.conditioning)

    def _layer_of(self, z_UH: Tensor) -> Tensor:
        return torch.full((z_UH.shape[0],), self.layer_index, device=z_UH.device)

    def most_kept(self, sizes: Sizes) -> int:
        """Modules to keep at most: they then take no more memory than the hypernetwork, or are the N of K = 1."""
        return max(self.num_experts, sizes.bottleneck)

    def _generate(self, z_UH: Tensor, hypernetwork: HyperNetwork | SharedHyperNetwork) -> HyperExpertWeights:
        weights: HyperExpertWeights = hypernetwork(z_UH, self._layer_of(z_UH))
        return weights

    def _announce(self, form: str, sets: int, tokens: int, how: str) -> None:
        if not self._announced and not torch.compiler.is_compiling():
            _LOGGER.info(
                f"HyperExperts of MoE layer {self.layer_index}: {form}, {sets} sets for {tokens} tokens; modules: {how}"
            )
            self._announced = True


class BakedHyperExperts(nn.Module):
    """The modules of all sets of one layer as parameters, in the place of what generates them.

    Args:
        num_experts: N.
        set_size: experts that a HyperExpert is generated without.
        sizes: D and A.
        conditioning: as of `HyperExperts`.
    """

    def __init__(self, num_experts: int, set_size: int, sizes: Sizes, conditioning: HyperConditioning) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.conditioning = conditioning
        U, D, A = math.comb(num_experts, set_size), sizes.hidden, sizes.adapter
        self.down_weight = nn.Parameter(torch.zeros(U, D, A))
        self.down_bias = nn.Parameter(torch.zeros(U, A))
        self.up_weight = nn.Parameter(torch.zeros(U, A, D))
        self.up_bias = nn.Parameter(torch.zeros(U, D))
        keep_initialisation(self)

    def reset_parameters(self) -> None:
        """Zero: no HyperExpert until the baked ones are loaded."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, x_TD: Tensor, selected_TK: Tensor, hypernetwork: None, *, gates_TK: Tensor, generated: None, kept: Any
    ) -> Tensor:
        """As `HyperExperts`; there is no hypernetwork, and nothing is generated or kept."""
        weights = HyperExpertWeights(self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        return apply_generated(x_TD, assign(selected_TK, gates_TK, self.num_experts, self.conditioning), weights)


def assign(
    selected_TK: Tensor, gates_TK: Tensor | None, num_experts: int, conditioning: HyperConditioning
) -> Assignment:
    """Which of all sets' HyperExperts each token takes.

    Raises:
        ValueError: conditioning is "route" and there are no gates.
    """
    if conditioning == "selection":
        return Assignment(rank_sets(selected_TK, num_experts).unsqueeze(1))
    if gates_TK is None:
        raise ValueError("conditioning 'route' weighs with gates: give gates_TK")
    return Assignment(selected_TK, gates_TK)


def generate_ahead(
    branches: list[HyperExperts],
    hypernetwork: HyperNetwork,
    x_TD: Tensor,
    top_k: int,
    kept: KeptHyperExperts | None = None,
) -> list[HyperExpertWeights] | None:
    """The modules of all layers by one matrix product, where the sets are known before routing and the modules fit.

    The hypernetwork's weights are then read once a pass, not once a layer.

    Args:
        branches: the HyperExperts of all MoE layers.
        hypernetwork: the one they share.
        x_TD: the tokens of the pass; only their number, dtype and device matter.
        top_k: K.
        kept: where this call of `generate` keeps them, if it does: for its later passes, so in any case that they are
            not too many.

    Returns:
        One entry a layer; None where each layer shall generate its own.
    """
    if kept is not None and kept.all_sets is not None:
        return kept.all_sets
    set_size, sizes, tokens = branches[0].set_size(top_k), hypernetwork.sizes, x_TD.shape[0]
    sets = math.comb(branches[0].num_experts, set_size)
    rows = tokens * (top_k if branches[0].conditioning == "route" else 1)
    if kept is not None:
        ahead = sets <= branches[0].most_kept(sizes)
    elif torch.compiler.is_compiling():  # in a graph whatever their cost, for the tokens may be a symbol
        ahead = branches[0].knows_sets(tokens, set_size, sizes)
    else:
        cheaper = cheaper_form(rows, sets, sizes, x_TD.device.type, x_TD.dtype)
        ahead = generated_weights_fit(tokens, sets, sizes) and cheaper == "per_set"
    if not ahead:
        return None
    sets_UK = all_sets(branches[0].num_experts, set_size, x_TD.device)
    # Layers may be on other devices than the tokens of the first one.
    z_UH = torch.cat([branch.encoder(sets_UK).to(x_TD.device) for branch in branches])
    layer_U = torch.arange(len(branches), device=z_UH.device).repeat_interleave(sets)
    parts = (weight.split(sets) for weight in hypernetwork(z_UH, layer_U))
    generated = [HyperExpertWeights(*layer) for layer in zip(*parts, strict=True)]
    if kept is not None:
        kept.all_sets = generated
    return generated
