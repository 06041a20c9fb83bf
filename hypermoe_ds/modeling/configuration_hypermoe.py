"""Configuration of a HyperMoE language model, with formulas for parameter and FLOP counts."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

RouterAuxLossScope = Literal["micro_batch", "data_parallel"]
HyperConditioning = Literal["selection", "route"]
QKNormScope = Literal["head", "all_heads"]
RouterDtype = Literal["model", "fp32"]
_CHOICES: Mapping[str, Any] = MappingProxyType(
    {
        "router_aux_loss_scope": RouterAuxLossScope,
        "hyper_conditioning": HyperConditioning,
        "qk_norm_scope": QKNormScope,
        "router_dtype": RouterDtype,
    }
)

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "tiny-10m": {
            "vocab_size": 4096,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 320,
            "num_experts": 8,
            "num_experts_per_tok": 1,
            "expert_embedding_size": 64,
            "selection_hidden_size": 64,
            "hypernetwork_input_size": 64,
            "bottleneck_size": 64,
            "adapter_size": 16,
        },
        "gpt2-small-8e": {
            "vocab_size": 50304,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "moe_intermediate_size": 2048,
            "num_experts": 8,
            "num_experts_per_tok": 1,
        },
        "3b-a0.4b": {
            "vocab_size": 50304,
            "hidden_size": 1280,
            "num_hidden_layers": 20,
            "num_attention_heads": 20,
            "num_key_value_heads": 5,
            "intermediate_size": 5120,
            "moe_intermediate_size": 1152,
            "num_experts": 32,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "first_dense_layers": 1,
            "qk_norm": True,
            "tie_word_embeddings": False,
            "max_position_embeddings": 4096,
        },
        "7b-a1b": {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "moe_intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "qk_norm": True,
            "tie_word_embeddings": False,
            "max_position_embeddings": 4096,
        },
    }
)


class ConfigurationError(ValueError):
    """A value of the configuration is invalid or inconsistent with other values.

    Attributes:
        where: the key and its value.
        problem: what is wrong with the value.
        remedy: how to correct the value.
    """

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        super().__init__(where, problem, remedy)
        self.where, self.problem, self.remedy = where, problem, remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}; {self.remedy}"


@dataclass(frozen=True)
class ParameterCounts:
    """Parameter counts of a model.

    Attributes:
        total: all parameters; tied embeddings count once.
        active: parameters that one token uses: all parameters except those of unselected experts.
        hypernetwork: parameters of the hypernetwork and all selection encoders; also included in `total` and `active`.
    """

    total: int
    active: int
    hypernetwork: int


class HyperMoEConfig(PreTrainedConfig):
    """Configuration of `HyperMoEForCausalLM`; the string below each field describes the field.

    The default hypernetwork sizes are those of the paper (HyperMoE, ACL 2024, arXiv 2402.12656).

    Raises:
        ConfigurationError: a value is invalid or inconsistent with other values.
    """

    model_type = "hypermoe"
    # The Trainer does not pass these outputs to `compute_metrics`, which needs only the logits. The value is a list,
    # because the Trainer appends to it.
    keys_to_ignore_at_inference = [  # noqa: RUF012 (read by Transformers)
        "past_key_values",
        "lm_loss",
        "aux_loss",
        "z_loss",
        "router_logits",
        "selected_experts",
        "hyper_expert_norms",
    ]

    vocab_size: int = 32000
    """size of the vocabulary."""
    hidden_size: int = 768
    """width D of the residual stream."""
    num_hidden_layers: int = 12
    """number of decoder layers."""
    num_attention_heads: int = 12
    """number of query heads."""
    num_key_value_heads: int = 12
    """number of key and value heads (grouped-query attention)."""
    head_dim: int = 0
    """width of a head; 0 means hidden_size / num_attention_heads."""
    max_position_embeddings: int = 2048
    """maximum sequence length, in tokens."""
    rope_theta: float = 10000.0
    """base of the rotary position embedding."""
    qk_norm: bool = False
    """RMS-normalise queries and keys before the rotation."""
    qk_norm_scope: QKNormScope = "head"
    """`head` normalises each head separately, with one weight; `all_heads` normalises all heads of a layer together."""
    rms_norm_eps: float = 1e-5
    """term added to the mean square in every RMSNorm."""
    intermediate_size: int = 0
    """width of the SwiGLU of dense layers; 0 means 4 * hidden_size."""
    first_dense_layers: int = 0
    """number of layers at the start of the model that have a dense SwiGLU instead of experts."""
    moe_every: int = 1
    """use a Mixture of Experts in every n-th layer after the first dense layers; the other layers are dense."""
    num_experts: int = 8
    """number N of experts per MoE layer."""
    num_experts_per_tok: int = 1
    """number K of experts per token."""
    moe_intermediate_size: int = 2048
    """width F of an expert's SwiGLU."""
    shared_expert_size: int = 0
    """width of a shared expert that processes every token; 0 disables it."""
    norm_topk_prob: bool = False
    """divide the K gates of a token by their sum. For K = 1, this setting has no effect: the gate is always the
    router's probability p. Dividing it by itself would give a constant gate of 1, and the router would receive no
    gradient."""
    router_dtype: RouterDtype = "fp32"
    """precision of the router's logits: `model` uses the precision of the model, `fp32` always uses fp32."""
    router_aux_loss_coef: float = 0.01
    """weight of the load-balancing loss, which is summed over the MoE layers."""
    router_aux_loss_scope: RouterAuxLossScope = "micro_batch"
    """tokens over which the load-balancing loss counts expert loads: each rank's micro-batch, or the micro-batches of
    all data-parallel ranks together."""
    z_loss_coef: float = 0.001
    """weight of the router z-loss, which is summed over the MoE layers."""
    hypernetwork: bool = True
    """add HyperExperts; false gives the plain Mixture of Experts."""
    hyper_conditioning: HyperConditioning = "selection"
    """input from which HyperExperts are generated. `selection` follows the paper: each token has one HyperExpert,
    generated from the experts that the token did not select. `route` is a different model: each selected expert j adds
    one HyperExpert, generated from all experts except j and weighted by the gate of j. A layer then has N different
    HyperExperts for any K."""
    baked_hyper_experts: bool = False
    """store the generated HyperExperts of each layer as parameters, without a hypernetwork. Exports with `--bake` set
    this field. A layer can have at most N baked HyperExperts."""
    expert_embedding_size: int = 128
    """width E of an expert embedding."""
    selection_hidden_size: int = 128
    """hidden width P of the selection encoder."""
    hypernetwork_input_size: int = 128
    """width H of an encoded selection."""
    layer_embedding_size: int = 10
    """width l of the layer embedding."""
    bottleneck_size: int = 128
    """width B of the hypernetwork's trunk."""
    adapter_size: int = 64
    """width A of a HyperExpert."""
    tie_word_embeddings: bool = True
    """use the token embedding as the output projection."""
    initializer_range: float = 0.02
    """standard deviation of the initial weights."""
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check_number("num_attention_heads", self.num_attention_heads, *_LIMITS["num_attention_heads"])
        _check_number("hidden_size", self.hidden_size, *_LIMITS["hidden_size"])
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                problem = f"does not divide hidden_size={self.hidden_size}"
                raise self._error("num_attention_heads", problem, "choose a divisor or give head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size == 0:
            self.intermediate_size = 4 * self.hidden_size
        self._check()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the configuration and its code. If a model is being saved, list all auto classes in `auto_map`.

        Transformers itself would list only the class of the saved model.
        """
        listed = getattr(self, "auto_map", None) or {}
        if listed.keys() & _AUTO_CLASSES.keys():
            self.auto_map = {**listed, **_AUTO_CLASSES}
        super().save_pretrained(save_directory, **kwargs)

    def _check(self) -> None:
        for key, (least, largest) in _LIMITS.items():
            _check_number(key, getattr(self, key), least, largest)
        for key in (key for key, kind in HyperMoEConfig.__annotations__.items() if kind is bool):
            if not isinstance(getattr(self, key), bool):
                raise self._error(key, "is not a boolean", "give true or false")
        for key, kind in _CHOICES.items():
            if getattr(self, key) not in get_args(kind):
                where = f"{key}={getattr(self, key)}"
                raise ConfigurationError(where, "unknown", f"choose one of {', '.join(get_args(kind))}")
        if self.num_experts_per_tok > self.num_experts:
            problem = f"more than num_experts={self.num_experts}"
            raise self._error("num_experts_per_tok", problem, f"choose 1 to {self.num_experts}")
        if self.baked_hyper_experts and self.hyper_sets > self.num_experts:
            problem = f"{self.hyper_sets:,} HyperExperts per layer are more than the {self.num_experts} experts"
            remedy = "bake a model with num_experts_per_tok=1 or hyper_conditioning=route"
            raise self._error("baked_hyper_experts", problem, remedy)
        if self.num_attention_heads % self.num_key_value_heads:
            problem = f"does not divide num_attention_heads={self.num_attention_heads}"
            raise self._error("num_key_value_heads", problem, "choose a divisor")
        if self.head_dim % 2:
            raise self._error("head_dim", "odd, but rotary embeddings need an even width", "choose an even number")
        if self.first_dense_layers > self.num_hidden_layers:
            problem = f"more than num_hidden_layers={self.num_hidden_layers}"
            raise self._error("first_dense_layers", problem, f"choose 0 to {self.num_hidden_layers}")

    def _error(self, key: str, problem: str, remedy: str) -> ConfigurationError:
        return ConfigurationError(f"{key}={getattr(self, key)!r}", problem, remedy)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Tensor-parallel plan: how Transformers shards the base model's weights over ranks for inference.

        Attention is sharded by heads, and every SwiGLU, including those of experts, by width. All other weights are
        replicated. A QK norm over all heads needs complete queries and keys, so they are gathered before the norm.
        """
        whole = self.qk_norm and self.qk_norm_scope == "all_heads"
        plan = dict.fromkeys(
            (f"layers.*.self_attn.{name}_proj" for name in "qkv"), "colwise_gather_output" if whole else "colwise"
        )
        plan["layers.*.self_attn.o_proj"] = "rowwise_split_input" if whole else "rowwise"
        if self.qk_norm and not whole:
            plan |= dict.fromkeys(
                (f"layers.*.self_attn.{name}_norm" for name in "qk"), "replicated_with_grad_allreduce"
            )
        dense = ["mlp"] * (len(self.moe_layers) < self.num_hidden_layers)
        shared = ["mlp.shared_experts"] * bool(self.moe_layers and self.shared_expert_size)
        for swiglu in dense + shared:
            plan |= {f"layers.*.{swiglu}.{name}_proj": "colwise" for name in ("gate", "up")}
            plan[f"layers.*.{swiglu}.down_proj"] = "rowwise"
        if self.moe_layers:
            plan["layers.*.mlp.experts"] = "moe_tp_experts"
            plan["layers.*.mlp.experts.gate_up_proj"] = "packed_colwise"
            plan["layers.*.mlp.experts.down_proj"] = "rowwise"
        return plan

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """Expert-parallel plan: how Transformers distributes whole experts of every layer over ranks."""
        if not self.moe_layers:
            return {}
        plan = dict.fromkeys((f"layers.*.mlp.experts.{name}_proj" for name in ("gate_up", "down")), "grouped_gemm")
        return plan | {"layers.*.mlp.experts": "ep_dispatch_experts"}

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the decoder layers with a Mixture of Experts."""
        sparse = range(self.first_dense_layers, self.num_hidden_layers)
        return [i for i in sparse if (i - self.first_dense_layers + 1) % self.moe_every == 0]

    @property
    def renormalises_gates(self) -> bool:
        """Whether the gates of a token are divided by their sum; always false for K = 1."""
        return self.norm_topk_prob and self.num_experts_per_tok > 1

    @property
    def hyper_set_size(self) -> int:
        """Number of experts that are excluded when a HyperExpert is generated."""
        return 1 if self.hyper_conditioning == "route" else self.num_experts_per_tok

    @property
    def hyper_sets(self) -> int:
        """Number of possible HyperExperts in a layer, C(N, hyper_set_size)."""
        return math.comb(self.num_experts, self.hyper_set_size)

    @property
    def hyper_experts_per_tok(self) -> int:
        """Number of HyperExperts per token."""
        return self.num_experts_per_tok if self.hyper_conditioning == "route" else 1

    def parameter_counts(self) -> ParameterCounts:
        """Return the parameter counts of the model, computed by formula."""
        D, N, K = self.hidden_size, self.num_experts, self.num_experts_per_tok
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        norms = 2 * self.head_dim if self.qk_norm_scope == "head" else queries + keys
        attention = 2 * D * queries + 2 * D * keys + (norms if self.qk_norm else 0)
        expert = 3 * D * self.moe_intermediate_size
        moe_layers, layers = len(self.moe_layers), self.num_hidden_layers

        dense = (layers - moe_layers) * 3 * D * self.intermediate_size
        always = layers * (attention + 2 * D) + D + dense
        always += moe_layers * (D * N + 3 * D * self.shared_expert_size)
        always += self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        hypernetwork = self._hypernetwork_parameters() if self.hypernetwork and moe_layers else 0
        return ParameterCounts(
            total=always + hypernetwork + moe_layers * N * expert,
            active=always + hypernetwork + moe_layers * K * expert,
            hypernetwork=hypernetwork,
        )

    def _hypernetwork_parameters(self) -> int:
        D, B, A = self.hidden_size, self.bottleneck_size, self.adapter_size
        E, P, H = self.expert_embedding_size, self.selection_hidden_size, self.hypernetwork_input_size
        layers = len(self.moe_layers)
        if self.baked_hyper_experts:
            return layers * self.hyper_sets * (2 * D * A + A + D)
        trunk = layers * self.layer_embedding_size + (H + self.layer_embedding_size + 1) * B
        heads = (B + 1) * (2 * D * A + A + D)
        encoder = self.num_experts * E + (E + 1) * P + (P + 1) * H
        return trunk + heads + layers * encoder

    def forward_flops_per_token(self, sequence_length: int) -> int:
        """Return the FLOPs of one token's forward pass; a training step takes three times as many.

        A multiply-add counts as two FLOPs. As in PaLM (arXiv 2204.02311, appendix B), attention is
        counted over the whole sequence, not only its causal half. Applying a HyperExpert counts as
        4 * D * A FLOPs. The cost of generating HyperExperts is not included, because all tokens
        with the same selection share it (see `generation_flops`).
        """
        D, K = self.hidden_size, self.num_experts_per_tok
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = 2 * (2 * D * queries + 2 * D * keys) + 4 * sequence_length * queries
        moe = 2 * (D * self.num_experts + 3 * D * (K * self.moe_intermediate_size + self.shared_expert_size))
        if self.hypernetwork:
            moe += 4 * D * self.adapter_size * self.hyper_experts_per_tok
        moe_layers = len(self.moe_layers)
        dense = (self.num_hidden_layers - moe_layers) * 6 * D * self.intermediate_size
        return self.num_hidden_layers * attention + moe_layers * moe + dense + 2 * D * self.vocab_size

    def generation_flops(self, sets: int) -> int:
        """Return the FLOPs to encode `sets` selections in one layer and generate their HyperExperts."""
        D, B, A, N = self.hidden_size, self.bottleneck_size, self.adapter_size, self.num_experts
        E, P, H = self.expert_embedding_size, self.selection_hidden_size, self.hypernetwork_input_size
        encoder = N * E + E * P + P * H
        trunk = (H + self.layer_embedding_size) * B
        return 2 * sets * (encoder + trunk + B * (2 * D * A + A + D))


_AUTO_CLASSES = {
    "AutoModel": "modeling_hypermoe.HyperMoEModel",
    "AutoModelForCausalLM": "modeling_hypermoe.HyperMoEForCausalLM",
}
# Minimum and maximum of each numeric field. If both limits are integers, the field must be an integer. The maxima are
# far above the values of any real model, but low enough that loops over layers or experts stay short.
_LIMITS: Mapping[str, tuple[int, int] | tuple[float, float]] = MappingProxyType(
    {
        "vocab_size": (1, 1 << 24),
        "hidden_size": (1, 1 << 20),
        "num_hidden_layers": (1, 10_000),
        "num_attention_heads": (1, 1 << 16),
        "num_key_value_heads": (1, 1 << 16),
        "head_dim": (1, 1 << 16),
        "max_position_embeddings": (1, 1 << 30),
        "rope_theta": (1.0, 1e12),
        "rms_norm_eps": (1e-20, 1.0),
        "intermediate_size": (1, 1 << 24),
        "first_dense_layers": (0, 10_000),
        "moe_every": (1, 10_000),
        "num_experts": (1, 1 << 16),
        "num_experts_per_tok": (1, 1 << 16),
        "moe_intermediate_size": (1, 1 << 24),
        "shared_expert_size": (0, 1 << 24),
        "router_aux_loss_coef": (0.0, 1e4),
        "z_loss_coef": (0.0, 1e4),
        "expert_embedding_size": (1, 1 << 20),
        "selection_hidden_size": (1, 1 << 20),
        "hypernetwork_input_size": (1, 1 << 20),
        "layer_embedding_size": (1, 1 << 20),
        "bottleneck_size": (1, 1 << 20),
        "adapter_size": (1, 1 << 20),
        "initializer_range": (0.0, 100.0),
    }
)


def _check_number(key: str, value: object, least: float, largest: float) -> None:
    whole = isinstance(least, int)
    if not isinstance(value, int if whole else (int, float)) or isinstance(value, bool):
        kind = "whole number" if whole else "number"
        raise ConfigurationError(f"{key}={value!r}", f"not a {kind}", f"give a {kind} from {least} to {largest}")
    if not least <= value <= largest:  # also true for NaN
        problem = "too small" if value < least else "too large" if value > largest else "not a number"
        limit = f"at most {largest}" if value > largest else f"at least {least}"
        raise ConfigurationError(f"{key}={value}", problem, f"give {limit}")
