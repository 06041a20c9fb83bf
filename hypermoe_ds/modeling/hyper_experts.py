"""HyperExperts: small modules generated from the identity of the experts that a token is not routed to.

The equations are from HyperMoE (Zhao et al., ACL 2024, arXiv 2402.12656). Step numbers refer to docs/METHOD.md.

Shape legend:
    T tokens, D hidden size, N experts, K experts per token, U selections (sets of experts),
    E expert-embedding size, P selection hidden size, H hypernetwork input size,
    B bottleneck, A adapter size, J HyperExperts per token, R = T * J routed rows.
"""

import logging
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .configuration_hypermoe import HyperConditioning
from .generated import Assignment, HyperExpertWeights, RoutedRows, apply_generated, assign, sort_rows
from .hyper_cache import HyperExpertCache, KeptHyperExperts
from .hyper_costs import Form, Sizes, cheaper_form, generated_weights_fit
from .selections import all_selections, distinct_selections

_LOGGER = logging.getLogger(__name__)


def keep_initialisation(part: nn.Module) -> None:
    """Mark the modules in `part`, so that the model initialises them with their own `reset_parameters`.

    Without the mark, Transformers would initialise these modules like all other Linear and Embedding modules.
    Generated weights would then be 10 to 30 times too large, and expert embeddings 50 times too small.
    """
    for module in part.modules():
        module.keeps_initialisation = True  # type: ignore[assignment]


class SelectionEncoder(nn.Module):
    """Encode which experts were not selected (steps 2 and 3). Each layer has its own encoder.

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
            selected_UK: expert indices, in any order within a row.

        Returns:
            z_UH. For K = N, the sum over unselected experts is exactly zero.
        """
        # Call the module instead of reading its weight, because only a call gathers a sharded embedding table.
        table_NE = self.expert_embedding(torch.arange(self.num_experts, device=selected_UK.device))
        unselected_UN = table_NE.new_ones(selected_UK.shape[0], table_NE.shape[0]).scatter(1, selected_UK, 0.0)
        # A GEMM with a 0/1 matrix gives exactly zero for K = N and bitwise identical results for any order of the K
        # experts. The GEMM's 2*U*N*E FLOPs are negligible compared with step 5, and its gradient uses no atomics.
        encoded: Tensor = self.mlp(unselected_UN @ table_NE)
        return encoded


class GeneratorHead(nn.Linear):
    """Linear layer that generates weights or biases from the bottleneck, initialised as in the paper.

    Generated weights are initially about 1e-5 (D = 768), so HyperExpert(x) is close to zero.

    Args:
        bottleneck: B.
        generated: number of values to generate.
        fan_in: number of inputs of the generated matrix; 1 for a generated bias.
    """

    def __init__(self, bottleneck: int, generated: int, fan_in: int = 1) -> None:
        self.bound = 1e-3 * math.sqrt(3 / (bottleneck * fan_in))
        super().__init__(bottleneck, generated)

    def reset_parameters(self) -> None:
        """Draw weights uniformly within +-1e-3 * sqrt(3 / (B * fan_in)) and set biases to zero."""
        nn.init.uniform_(self.weight, -self.bound, self.bound)
        nn.init.zeros_(self.bias)


class HyperNetwork(nn.Module):
    """The hypernetwork that all layers and experts share (steps 4 to 6).

    Parameters are read only inside `forward`, so that sharded parameters can be gathered for the call. Linear layers
    are called as modules, because they may have adapters or be quantised or offloaded. Only `_factored` reads weights
    directly, and only from plain linear layers.

    Args:
        hidden_size: D.
        input_size: H.
        num_layers: L, the number of layers that share the hypernetwork.
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
        """Sizes D, A and B for the cost model."""
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
        """Generate a HyperExpert for each of U encoded selections and, if tokens are given, apply the HyperExperts.

        Args:
            z_UH: encoded selections.
            layer_U: layer index of each selection.
            x_TD: input of the MoE block; if None, weights are generated but not applied.
            assignment: which of the U HyperExperts each token uses.
            form: "per_set", "factored" or "per_token"; all three are exact.
            recompute: with "per_set", generate the weights again in the backward pass instead of saving them.

        Returns:
            y_TD, or the generated weights if x_TD is None.
        """
        u_UB = torch.relu(self.trunk(torch.cat([z_UH, self.layer_embedding(layer_U)], dim=-1)))
        if x_TD is None or assignment is None:
            return self._generate(u_UB)
        if form == "per_set":
            if recompute and torch.is_grad_enabled():
                rows = sort_rows(assignment, (len(u_UB), self.hidden_size, self.adapter_size), u_UB)
                # Recompute only `_per_set`. `forward` must run only once, because each call gathers sharded parameters.
                y_TD: Tensor = checkpoint(self._per_set, x_TD, assignment, u_UB, rows, use_reentrant=False)
                return y_TD
            return self._per_set(x_TD, assignment, u_UB)
        x_RD = x_TD.repeat_interleave(assignment.ids_TJ.shape[1], dim=0)
        u_RB = u_UB[assignment.ids_TJ.flatten()]
        if form == "per_token":
            return assignment.sum_over_rows(self._per_token(x_RD, u_RB))
        plain = _is_plain_linear(self.down_weight) and _is_plain_linear(self.up_weight)
        return assignment.sum_over_rows(self._factored(x_RD, u_RB) if plain else self._per_token_in_chunks(x_RD, u_RB))

    def _generate(self, u_UB: Tensor) -> HyperExpertWeights:
        """Generate the HyperExperts of all selections, with one matrix product per weight or bias (step 5)."""
        return HyperExpertWeights(
            self.down_weight(u_UB).view(-1, self.hidden_size, self.adapter_size),
            self.down_bias(u_UB),
            self.up_weight(u_UB).view(-1, self.adapter_size, self.hidden_size),
            self.up_bias(u_UB),
        )

    def _per_set(self, x_TD: Tensor, assignment: Assignment, u_UB: Tensor, rows: RoutedRows | None = None) -> Tensor:
        """Generate weights once per selection and apply them with grouped matrix products."""
        return apply_generated(x_TD, assignment, self._generate(u_UB), rows)

    def _per_token(self, x_RD: Tensor, u_RB: Tensor) -> Tensor:
        """Generate weights for each row, as in the paper. Tests use this method as a reference."""
        down_RDA, down_bias_RA, up_RAD, up_bias_RD = self._generate(u_RB)
        inner_RA = torch.relu(torch.einsum("rd,rda->ra", x_RD, down_RDA) + down_bias_RA)
        return torch.einsum("ra,rad->rd", inner_RA, up_RAD) + up_bias_RD

    def _per_token_in_chunks(self, x_RD: Tensor, u_RB: Tensor) -> Tensor:
        """Compute `_per_token` in chunks, for linear layers whose weights `_factored` cannot read.

        A chunk has B rows, so its generated weights take as much memory as the linear layers. The forward pass takes
        about as many FLOPs as that of `_factored`.
        """
        if torch.compiler.is_compiling():
            return self._per_token(x_RD, u_RB)
        chunks = zip(*(torch.split(rows, self.bottleneck_size) for rows in (x_RD, u_RB)), strict=True)
        return torch.cat([checkpoint(self._per_token, x_rD, u_rB, use_reentrant=False) for x_rD, u_rB in chunks])

    def _factored(self, x_RD: Tensor, u_RB: Tensor) -> Tensor:
        """Contract x with the B basis matrices, then sum the results, weighted by u. No weights are generated."""
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
    """Wrap the hypernetwork so that it can be passed to the layers as an argument.

    The accelerate library moves all arguments of a layer, including modules, to the layer's device. Moving a module
    fails if its weights are offloaded to disk, so this wrapper is not a module.
    """

    def __init__(self, module: HyperNetwork) -> None:
        self._module = module

    @property
    def sizes(self) -> Sizes:
        """Sizes D, A and B."""
        return self._module.sizes

    def __call__(self, *args: Any) -> Any:
        """Call the hypernetwork."""
        return self._module(*args)


def _is_plain_linear(head: nn.Module) -> bool:
    """Return whether calling `head` only applies its stored weight and bias.

    The result can differ with adapters, parametrizations, hooks, quantised weights (which have another type) and
    offloading by accelerate (which replaces `forward`).
    """
    return (
        type(head) is GeneratorHead
        and type(head.weight) is nn.Parameter
        and "forward" not in head.__dict__
        and not head._forward_pre_hooks
        and not head._forward_hooks
    )


class _Plan(NamedTuple):
    """How to compute the HyperExperts of a layer for a batch of tokens.

    Attributes:
        selections_UK: selections to generate HyperExperts for.
        assignment: which HyperExperts each token uses.
        form: form of the computation.
        recompute: generate the weights again in the backward pass instead of saving them.
        cache: cache to fetch the weights from; if None, this pass generates the weights.
    """

    selections_UK: Tensor
    assignment: Assignment
    form: Form
    recompute: bool = False
    cache: HyperExpertCache | None = None


class HyperExperts(nn.Module):
    """The HyperExperts of one layer.

    Args:
        encoder: the selection encoder of this layer.
        layer_index: row of this layer in the hypernetwork's layer embedding.
        conditioning: with "selection", as in the paper, each token uses one HyperExpert, generated from all experts
            except its K selected experts. With "route", each token uses one HyperExpert for each selected expert j,
            generated from all experts except j and weighted by the gate of j.
    """

    def __init__(
        self, encoder: SelectionEncoder, layer_index: int, conditioning: HyperConditioning = "selection"
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.layer_index = layer_index
        self.conditioning = conditioning
        self._logged = False

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
        """Return HyperExpert(x) for every token (steps 2 to 6).

        Args:
            x_TD: input of the MoE block.
            selected_TK: distinct indices of the experts that the router selected, in any order.
            hypernetwork: the hypernetwork that all layers share.
            form: form of the computation. All forms agree up to rounding; "auto" uses "per_set" or "factored",
                whichever is cheaper.
            gates_TK: weights of the experts' outputs; required for conditioning "route".
            generated: weights of all possible selections, if already generated.
            kept: cache of the current `generate` call; used only without gradients.

        Returns:
            y_TD, to be added to the experts' output.
        """
        if generated is not None:
            self._log_once("per_set", len(generated.up_bias), x_TD.shape[0], "generated together for all layers")
            assignment = assign(selected_TK, gates_TK, self.num_experts, self.conditioning)
            return apply_generated(x_TD, assignment, generated)
        plan = self._plan(x_TD, selected_TK, hypernetwork.sizes, form, gates_TK, kept)
        if plan.cache is not None:
            weights = plan.cache.fetch(plan.selections_UK, lambda new_UK: self._generate(new_UK, hypernetwork))
            return apply_generated(x_TD, plan.assignment, weights)
        z_UH = self.encoder(plan.selections_UK)
        layer_U = self._layer_of(z_UH)
        output: Tensor = hypernetwork(z_UH, layer_U, x_TD, plan.assignment, plan.form, plan.recompute)
        return output.to(x_TD.device)  # the hypernetwork may be on another device

    def _plan(
        self,
        x_TD: Tensor,
        selected_TK: Tensor,
        sizes: Sizes,
        form: Form | Literal["auto"],
        gates_TK: Tensor | None,
        kept: KeptHyperExperts | None,
    ) -> _Plan:
        """Decide which HyperExperts to generate and how to apply them, without using any weights."""
        tokens, set_size = selected_TK.shape[0], self.set_size(selected_TK.shape[1])
        if self.knows_selections(tokens, set_size, sizes):
            selections_UK = all_selections(self.num_experts, set_size, x_TD.device)
            assignment = assign(selected_TK, gates_TK, self.num_experts, self.conditioning)
        elif torch.compiler.is_compiling():
            # The number of distinct selections depends on the data, so each token gets its own HyperExpert.
            selections_UK, assignment = selected_TK, Assignment(torch.arange(tokens, device=x_TD.device).unsqueeze(1))
            form = "factored" if form == "auto" else form
        else:
            selections_UK, index_T = distinct_selections(selected_TK, self.num_experts)
            assignment = Assignment(index_T.unsqueeze(1))
            if kept is not None and form == "auto" and not torch.is_grad_enabled():
                cache = kept.layer(self.layer_index, self.most_kept(sizes))
                if len(selections_UK) <= cache.capacity:
                    return _Plan(selections_UK, assignment, "per_set", cache=cache)
        form, recompute = self._choose(form, assignment, selections_UK.shape[0], set_size, sizes, x_TD)
        return _Plan(selections_UK, assignment, form, recompute)

    @property
    def num_experts(self) -> int:
        """Number of experts N."""
        return self.encoder.num_experts

    def set_size(self, top_k: int) -> int:
        """Return the number of experts in a selection: K, or 1 with conditioning "route"."""
        return 1 if self.conditioning == "route" else top_k

    def knows_selections(self, tokens: int, set_size: int, sizes: Sizes) -> bool:
        """Return whether to generate HyperExperts for all possible selections instead of waiting for the router."""
        sets = math.comb(self.num_experts, set_size)
        if sets <= self.num_experts or torch.compiler.is_compiling():  # `tokens` may be symbolic when compiling
            return sets <= self.num_experts
        return generated_weights_fit(tokens, sets, sizes)

    def encode_all(self, set_size: int, device: torch.device) -> Tensor:
        """Return the encodings of all possible selections, [C(N, set_size), H]."""
        z_UH: Tensor = self.encoder(all_selections(self.num_experts, set_size, device))
        return z_UH

    def _choose(
        self, form: Form | Literal["auto"], assignment: Assignment, sets: int, set_size: int, sizes: Sizes, x_TD: Tensor
    ) -> tuple[Form, bool]:
        """Return the form, and whether the backward pass generates the weights again."""
        if torch.compiler.is_compiling():
            return ("per_set" if form == "auto" else form), False
        tokens, rows = x_TD.shape[0], assignment.ids_TJ.numel()
        # The decision depends on the number of possible selections, so it is the same on all ranks.
        recompute = not generated_weights_fit(tokens, min(tokens, math.comb(self.num_experts, set_size)), sizes)
        if form == "auto":
            form = cheaper_form(rows, sets, sizes, x_TD.device.type, x_TD.dtype)
            saved = "generated again in the backward pass" if recompute else "saved for the backward pass"
            self._log_once(form, sets, tokens, saved if form == "per_set" else "none")
        return form, recompute

    def _layer_of(self, z_UH: Tensor) -> Tensor:
        return torch.full((z_UH.shape[0],), self.layer_index, device=z_UH.device)

    def most_kept(self, sizes: Sizes) -> int:
        """Return the cache capacity, max(N, B). B generated HyperExperts take as much memory as the hypernetwork."""
        return max(self.num_experts, sizes.bottleneck)

    def _generate(self, selections_UK: Tensor, hypernetwork: HyperNetwork | SharedHyperNetwork) -> HyperExpertWeights:
        z_UH = self.encoder(selections_UK)
        weights: HyperExpertWeights = hypernetwork(z_UH, self._layer_of(z_UH))
        return weights

    def _log_once(self, form: str, selections: int, tokens: int, weights: str) -> None:
        if not self._logged and not torch.compiler.is_compiling():
            _LOGGER.info(
                f"HyperExperts of MoE layer {self.layer_index}: {form}, {selections} selections for {tokens} tokens; "
                f"generated weights: {weights}"
            )
            self._logged = True


class BakedHyperExperts(nn.Module):
    """The generated HyperExperts of all selections of one layer, stored as parameters.

    Args:
        num_experts: N.
        set_size: number of experts in a selection.
        sizes: D and A.
        conditioning: as in `HyperExperts`.
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
        """Set all weights to zero; loading a checkpoint replaces them with the baked weights."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, x_TD: Tensor, selected_TK: Tensor, hypernetwork: None, *, gates_TK: Tensor, generated: None, kept: Any
    ) -> Tensor:
        """Return HyperExpert(x) from the stored weights; `hypernetwork`, `generated` and `kept` are ignored."""
        weights = HyperExpertWeights(self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        return apply_generated(x_TD, assign(selected_TK, gates_TK, self.num_experts, self.conditioning), weights)


def generate_ahead(
    layers: list[HyperExperts],
    hypernetwork: HyperNetwork,
    x_TD: Tensor,
    top_k: int,
    kept: KeptHyperExperts | None = None,
) -> list[HyperExpertWeights] | None:
    """Generate the HyperExperts of all layers in one call, if all selections are known and the weights fit.

    This reduces memory traffic, because the hypernetwork's weights are read once per pass instead of once per layer.

    Args:
        layers: the HyperExperts of all MoE layers.
        hypernetwork: the hypernetwork that the layers share.
        x_TD: tokens of the pass; only the number of tokens, the dtype and the device are used.
        top_k: K.
        kept: cache of the current `generate` call. Later passes reuse the weights, so the weights are generated if the
            cache can store them, regardless of the cost of this pass.

    Returns:
        The weights of each layer, or None if each layer must generate its own weights.
    """
    if kept is not None and kept.all_selections is not None:
        return kept.all_selections
    set_size, sizes, tokens = layers[0].set_size(top_k), hypernetwork.sizes, x_TD.shape[0]
    sets = math.comb(layers[0].num_experts, set_size)
    rows = tokens * (top_k if layers[0].conditioning == "route" else 1)
    if kept is not None:
        ahead = sets <= layers[0].most_kept(sizes)
    elif torch.compiler.is_compiling():  # costs cannot be compared: `tokens` may be symbolic
        ahead = layers[0].knows_selections(tokens, set_size, sizes)
    else:
        cheaper = cheaper_form(rows, sets, sizes, x_TD.device.type, x_TD.dtype)
        ahead = generated_weights_fit(tokens, sets, sizes) and cheaper == "per_set"
    if not ahead:
        return None
    sets_UK = all_selections(layers[0].num_experts, set_size, x_TD.device)
    # Layers and tokens may be on different devices.
    z_UH = torch.cat([layer.encoder(sets_UK).to(x_TD.device) for layer in layers])
    layer_U = torch.arange(len(layers), device=z_UH.device).repeat_interleave(sets)
    parts = (weight.split(sets) for weight in hypernetwork(z_UH, layer_U))
    generated = [HyperExpertWeights(*layer) for layer in zip(*parts, strict=True)]
    if kept is not None:
        kept.all_selections = generated
    return generated
