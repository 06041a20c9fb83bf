"""HyperExperts: small modules generated from the identity of the experts a token did not choose.

Equations: HyperMoE (Zhao et al., ACL 2024, arXiv 2402.12656); docs/METHOD.md numbers them.

Shape legend:
    T tokens, D hidden size, N experts, K experts chosen for a token, U distinct selections,
    E expert-embedding size, P selection hidden size, H hypernetwork input size,
    B bottleneck, A adapter size.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

Form = Literal["auto", "per_set", "factored", "per_token"]

_BITS_PER_WORD = 62  # of an int64, clear of its sign


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
        table_NE = self.expert_embedding.weight
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

    It also applies what it generates, so that its parameters are read inside its own forward only.

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
        self.layer_embedding = nn.Embedding(num_layers, layer_embedding_size)
        self.trunk = nn.Linear(input_size + layer_embedding_size, bottleneck_size)
        self.down_weight = GeneratorHead(bottleneck_size, hidden_size * adapter_size, fan_in=hidden_size)
        self.down_bias = GeneratorHead(bottleneck_size, adapter_size)
        self.up_weight = GeneratorHead(bottleneck_size, adapter_size * hidden_size, fan_in=adapter_size)
        self.up_bias = GeneratorHead(bottleneck_size, hidden_size)
        keep_initialisation(self)

    def forward(self, x_TD: Tensor, z_UH: Tensor, set_of_token_T: Tensor, layer_index: int, form: Form) -> Tensor:
        """Generate a HyperExpert for each of U encoded selections and apply each to its tokens.

        Args:
            x_TD: input of the MoE block.
            z_UH: encoded selections.
            set_of_token_T: for each token the row of its selection in `z_UH`.
            layer_index: row of the layer embedding.
            form: "per_set", "factored" or "per_token"; all three are exact.

        Returns:
            y_TD.
        """
        layer_UL = self.layer_embedding.weight[layer_index].expand(z_UH.shape[0], -1)
        u_UB = torch.relu(self.trunk(torch.cat([z_UH, layer_UL], dim=-1)))
        if form == "per_set":
            return self._per_set(x_TD, u_UB, set_of_token_T)
        if form == "factored":
            return self._factored(x_TD, u_UB[set_of_token_T])
        return self._per_token(x_TD, u_UB[set_of_token_T])

    def _per_token(self, x_TD: Tensor, u_TB: Tensor) -> Tensor:
        """The equations as they stand: each token gets weights of its own. The reference for tests."""
        down_TDA = self.down_weight(u_TB).view(-1, self.hidden_size, self.adapter_size)
        up_TAD = self.up_weight(u_TB).view(-1, self.adapter_size, self.hidden_size)
        inner_TA = torch.relu(torch.einsum("td,tda->ta", x_TD, down_TDA) + self.down_bias(u_TB))
        output_TD: Tensor = torch.einsum("ta,tad->td", inner_TA, up_TAD) + self.up_bias(u_TB)
        return output_TD

    def _per_set(self, x_TD: Tensor, u_UB: Tensor, set_of_token_T: Tensor) -> Tensor:
        """Weights once per set, tokens sorted by set, two grouped matrix products."""
        sets = u_UB.shape[0]
        down_UDA = self.down_weight(u_UB).view(sets, self.hidden_size, self.adapter_size)
        up_UAD = self.up_weight(u_UB).view(sets, self.adapter_size, self.hidden_size)
        order_T = torch.argsort(set_of_token_T, stable=True)
        counts = torch.bincount(set_of_token_T, minlength=sets).tolist()

        groups = zip(
            torch.split(x_TD[order_T], counts),
            *(rows.unbind() for rows in (down_UDA, self.down_bias(u_UB), up_UAD, self.up_bias(u_UB))),
            strict=True,
        )
        outputs = [
            torch.addmm(up_bias_D, torch.relu(torch.addmm(down_bias_A, x_tD, down_DA)), up_AD)
            for x_tD, down_DA, down_bias_A, up_AD, up_bias_D in groups
        ]
        sorted_TD = torch.cat(outputs)  # under autocast not of x's dtype
        return torch.empty_like(sorted_TD).index_copy(0, order_T, sorted_TD)

    def _factored(self, x_TD: Tensor, u_TB: Tensor) -> Tensor:
        """Contract x with the B basis matrices first, mix with u after: no generated weight exists."""
        D, A, B = self.hidden_size, self.adapter_size, u_TB.shape[1]
        basis_TAB = (x_TD @ self.down_weight.weight.view(D, A * B)).view(-1, A, B)
        down_TA = torch.bmm(basis_TAB, u_TB.unsqueeze(-1)).squeeze(-1)
        down_TA = down_TA + x_TD @ self.down_weight.bias.view(D, A) + self.down_bias(u_TB)
        inner_TA = torch.relu(down_TA)

        mixed_TAB = (inner_TA.unsqueeze(-1) * u_TB.unsqueeze(1)).view(-1, A * B)
        basis_ABD = self.up_weight.weight.view(A, D, B).transpose(1, 2).reshape(A * B, D)
        output_TD: Tensor = mixed_TAB @ basis_ABD + inner_TA @ self.up_weight.bias.view(A, D) + self.up_bias(u_TB)
        return output_TD


class HyperExperts(nn.Module):
    """The HyperExperts of one layer: its selection encoder and its place in the hypernetwork.

    Args:
        encoder: this layer's `SelectionEncoder`.
        layer_index: this layer's row of the hypernetwork's layer embedding.
    """

    def __init__(self, encoder: SelectionEncoder, layer_index: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.layer_index = layer_index

    def forward(self, x_TD: Tensor, selected_TK: Tensor, hypernetwork: HyperNetwork, form: Form = "auto") -> Tensor:
        """HyperExpert(x) for every token (steps 2 to 6).

        Args:
            x_TD: input of the MoE block.
            selected_TK: the router's choice, distinct expert indices in any order.
            hypernetwork: the one shared by all layers.
            form: how to compute it. The forms agree to rounding; "auto" takes the cheaper of
                "per_set" and "factored".

        Returns:
            y_TD, to be added to the experts' output.
        """
        sets_UK, set_of_token_T = distinct_sets(selected_TK, self.encoder.expert_embedding.num_embeddings)
        if form == "auto":
            form = cheaper_form(x_TD.shape[0], sets_UK.shape[0], hypernetwork)
        output: Tensor = hypernetwork(x_TD, self.encoder(sets_UK), set_of_token_T, self.layer_index, form)
        return output


def distinct_sets(selected_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The distinct selections among the tokens.

    For K = 1 and K = N they are known without looking: the N experts, the one full set.

    Returns:
        sets_UK, one row of expert indices a set, and set_of_token_T, each token's row.
    """
    tokens, K = selected_TK.shape
    if K == 1:
        return torch.arange(num_experts, device=selected_TK.device).unsqueeze(1), selected_TK.squeeze(1)
    if num_experts == K:
        everyone_1N = torch.arange(num_experts, device=selected_TK.device).unsqueeze(0)
        return everyone_1N, selected_TK.new_zeros(tokens)
    keys_TW = _set_keys(selected_TK, num_experts)
    if keys_TW.shape[1] == 1:
        unique_U, set_of_token_T = torch.unique(keys_TW.squeeze(1), return_inverse=True)
    else:
        unique_U, set_of_token_T = torch.unique(keys_TW, dim=0, return_inverse=True)
    member_U = torch.empty(unique_U.shape[0], dtype=torch.long, device=selected_TK.device)
    member_U[set_of_token_T] = torch.arange(tokens, device=selected_TK.device)
    return selected_TK[member_U], set_of_token_T


def _set_keys(selected_TK: Tensor, num_experts: int) -> Tensor:
    """Bit sets of the selections, in as many int64 words as the experts need."""
    words = -(-num_experts // _BITS_PER_WORD)
    bits_TK = torch.ones_like(selected_TK) << (selected_TK % _BITS_PER_WORD)
    word_TK = selected_TK // _BITS_PER_WORD
    return torch.stack([(bits_TK * (word_TK == word)).sum(1) for word in range(words)], dim=1)


def cheaper_form(tokens: int, sets: int, hypernetwork: HyperNetwork) -> Form:
    """The cheaper exact form by FLOPs, plus what a set costs beside its FLOPs.

    "per_set" spends 2*B FLOPs on each of the 2*D*A generated weights of a set and 2 on each of
    them for a token; "factored" spends 2*B on each of them for a token.
    """
    weights = 2 * hypernetwork.hidden_size * hypernetwork.adapter_size
    bottleneck = hypernetwork.trunk.out_features
    per_set = sets * (2 * bottleneck * weights + _FLOPS_OF_A_SET) + tokens * 2 * weights
    factored = tokens * 2 * bottleneck * weights
    return "per_set" if per_set <= factored else "factored"


# Starting two products for a set takes about as long as this many FLOPs (20 us at 50 GFLOP/s).
_FLOPS_OF_A_SET = 1_000_000
