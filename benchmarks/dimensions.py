"""The sizes of a tower, as configurations give them: what roofline tables and benchmark cases are made from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

TIME_FEATURES = 256


@dataclass(frozen=True)
class Dimensions:
    """The sizes of one tower; the other has the same. `pattern` has a letter a layer: M Mamba-2, * attention, E MoE."""

    hidden: int
    vocab: int
    pattern: str
    mamba_heads: int
    mamba_head_dim: int
    groups: int
    state: int
    query_heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    expert_width: int
    shared_width: int
    taps: int = 4
    block: int = 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "pattern":
                if not value or set(value) - set("ME*"):
                    raise ValueError(f"pattern must hold M, E and * alone, and at least one of them, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            elif value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.mamba_heads % self.groups or self.query_heads % self.kv_heads:
            raise ValueError("groups must divide mamba_heads, and kv_heads must divide query_heads")
        if self.top_k > self.experts:
            raise ValueError(f"top_k must be at most experts = {self.experts}, got {self.top_k}")

    @classmethod
    def from_config(cls, path: str | Path) -> Dimensions:
        """Those of a checkpoint's `config.json`; errors as `twotower.Config.from_json`, naming file and field."""
        from twotower.config import Config

        c = Config.from_json(path)
        return cls(
            hidden=c.hidden_size, vocab=c.vocab_size, pattern=c.hybrid_override_pattern,
            mamba_heads=c.mamba_num_heads, mamba_head_dim=c.mamba_head_dim, groups=c.n_groups, state=c.ssm_state_size,
            query_heads=c.num_attention_heads, kv_heads=c.num_key_value_heads, head_dim=c.head_dim,
            experts=c.n_routed_experts, top_k=c.num_experts_per_tok, expert_width=c.moe_intermediate_size,
            shared_width=c.moe_shared_expert_intermediate_size, taps=c.conv_kernel,
        )  # fmt: skip

    @property
    def inner(self) -> int:
        """Channels of the Mamba mixer."""
        return self.mamba_heads * self.mamba_head_dim

    @property
    def conv(self) -> int:
        """Channels of the Mamba convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state

    @property
    def projected(self) -> int:
        """Columns of Mamba's input projection: gate, x, B, C and a time step a head."""
        return self.inner + self.conv + self.mamba_heads

    @property
    def attention_weights(self) -> int:
        """Parameters of an attention layer's four projections."""
        return 2 * self.hidden * self.head_dim * (self.query_heads + self.kv_heads)

    def tower_parameters(self) -> int:
        """Of one tower, with embeddings and head."""
        mamba = self.hidden * self.projected + self.inner * self.hidden + self.conv * (self.taps + 1)
        mamba += 3 * self.mamba_heads + self.inner
        moe = 2 * self.hidden * (self.experts * self.expert_width + self.shared_width) + self.experts * (
            self.hidden + 1
        )
        each = {"M": mamba, "*": self.attention_weights, "E": moe}
        norms = (len(self.pattern) + 1) * self.hidden
        return sum(each[kind] for kind in self.pattern) + norms + 2 * self.vocab * self.hidden

    def parameters(self) -> int:
        """Of both towers and of what conditions the denoiser on time."""
        time = (TIME_FEATURES + 1) * self.hidden + (self.hidden + 1) * self.hidden + (self.hidden + 1) * 3 * self.hidden
        return 2 * self.tower_parameters() + time + 3 * len(self.pattern) * self.hidden

    def experts_hit(self, tokens: int) -> float:
        """Distinct experts that `tokens` tokens touch in one layer, expected under uniform routing."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens)


REAL = Dimensions(
    hidden=2688, vocab=131072, pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    mamba_heads=64, mamba_head_dim=64, groups=8, state=128, query_heads=32, kv_heads=2, head_dim=128,
    experts=128, top_k=6, expert_width=1856, shared_width=3712,
)  # fmt: skip
MID = Dimensions(
    hidden=1024, vocab=32768, pattern="MEM*EMEMEM*E",
    mamba_heads=32, mamba_head_dim=64, groups=8, state=128, query_heads=16, kv_heads=2, head_dim=64,
    experts=32, top_k=6, expert_width=704, shared_width=1408,
)  # fmt: skip
SHAPES = {"real": REAL, "mid": MID}
