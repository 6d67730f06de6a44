from typing import Any, Protocol, TypedDict

class KernelResources(TypedDict):
    registers: int
    shared_bytes: int
    local_bytes: int

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cuda: bool
    cuda_version: str | None
    cutlass_version: str | None
    architectures: list[str]
    cpu_features: list[str]
    cpu_isas: list[str]
    cpu_isa: str
    threads: int
    kernels: dict[str, KernelResources]

def build_info() -> BuildInfo: ...

class DLPackArray(Protocol):
    """What speaks DLPack: arrays of NumPy, JAX, CuPy, torch, and `Array`."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class Array:
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def bits(self) -> Array: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

Out = DLPackArray | None
Outs = tuple[Out, ...] | list[Out] | None

def workspace_bytes(op: str, *args: Any, **kwargs: Any) -> int: ...
def rms_norm(
    x: DLPackArray,
    weight: DLPackArray,
    eps: float = 1e-5,
    *,
    shift: DLPackArray | None = None,
    scale: DLPackArray | None = None,
    modulate: str = "none",
    delta: DLPackArray | None = None,
    gate: DLPackArray | None = None,
    out: Outs = None,
    workspace: DLPackArray | None = None,
    stream: int | None = None,
    dtype: str | None = None,
) -> tuple[Any, Any]: ...
def gated_group_rms_norm(
    y: DLPackArray,
    z: DLPackArray,
    weight: DLPackArray,
    group_size: int,
    eps: float = 1e-5,
    *,
    out: Out = None,
    workspace: DLPackArray | None = None,
    stream: int | None = None,
    dtype: str | None = None,
) -> Any: ...
def causal_conv1d(
    x: DLPackArray,
    weight: DLPackArray,
    bias: DLPackArray | None = None,
    initial_state: DLPackArray | None = None,
    *,
    activation: str = "silu",
    out: Outs = None,
    workspace: DLPackArray | None = None,
    stream: int | None = None,
    dtype: str | None = None,
) -> tuple[Any, Any]: ...
def ssd_scan(
    x: DLPackArray,
    dt: DLPackArray,
    A_log: DLPackArray,
    B: DLPackArray,
    C: DLPackArray,
    D: DLPackArray | None = None,
    dt_bias: DLPackArray | None = None,
    initial_state: DLPackArray | None = None,
    *,
    chunk_size: int = 128,
    states_every: int = 0,
    out: Outs = None,
    workspace: DLPackArray | None = None,
    stream: int | None = None,
    dtype: str | None = None,
) -> tuple[Any, ...]: ...
def mamba_block(
    zxbcdt: DLPackArray,
    conv_weight: DLPackArray,
    conv_bias: DLPackArray | None,
    A_log: DLPackArray,
    D: DLPackArray,
    dt_bias: DLPackArray,
    norm_weight: DLPackArray,
    conv_state: DLPackArray | None,
    ssm_state: DLPackArray | None,
    *,
    heads: int,
    groups: int,
    state_size: int,
    eps: float = 1e-5,
    update_state: bool = False,
    out: Outs = None,
    workspace: DLPackArray | None = None,
    stream: int | None = None,
    dtype: str | None = None,
) -> tuple[Any, Any, Any]: ...
def moe_route(
    x: DLPackArray,
    gate_weight: DLPackArray,
    correction_bias: DLPackArray,
    top_k: int,
    scaling: float,
    *,
    out: Outs = None,
    workspace: DLPackArray | None = None,
    stream: int | None = None,
    dtype: str | None = None,
) -> tuple[Any, Any]: ...
def moe_experts(
    x: DLPackArray,
    expert_ids: DLPackArray,
    expert_weights: DLPackArray,
    up: DLPackArray,
    down: DLPackArray,
    shared_up: DLPackArray | None = None,
    shared_down: DLPackArray | None = None,
    *,
    activation: str = "relu2",
    out: Out = None,
    workspace: DLPackArray | None = None,
    stream: int | None = None,
    dtype: str | None = None,
) -> Any: ...
def block_attention(
    q: DLPackArray,
    k: DLPackArray,
    v: DLPackArray,
    context_k: DLPackArray | None = None,
    context_v: DLPackArray | None = None,
    context_lengths: DLPackArray | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    out: Out = None,
    workspace: DLPackArray | None = None,
    stream: int | None = None,
    dtype: str | None = None,
) -> Any: ...
def two_stream_attention(
    q: DLPackArray,
    context_k: DLPackArray,
    context_v: DLPackArray,
    k: DLPackArray,
    v: DLPackArray,
    block_size: int,
    *,
    out: Out = None,
    workspace: DLPackArray | None = None,
    stream: int | None = None,
    dtype: str | None = None,
) -> Any: ...
def denoise_commit(
    logits: DLPackArray,
    block: DLPackArray,
    step: int | DLPackArray,
    steps: int,
    *,
    threshold: float,
    mask_token_id: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | DLPackArray = 0,
    offset: int | DLPackArray = 0,
    out: Outs = None,
    workspace: DLPackArray | None = None,
    stream: int | None = None,
    dtype: str | None = None,
) -> tuple[Any, Any, Any, Any, Any]: ...
def lm_head_commit(
    hidden: DLPackArray,
    weight: DLPackArray,
    block: DLPackArray,
    step: int | DLPackArray,
    steps: int,
    *,
    threshold: float,
    mask_token_id: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | DLPackArray = 0,
    offset: int | DLPackArray = 0,
    out: Outs = None,
    workspace: DLPackArray | None = None,
    stream: int | None = None,
    dtype: str | None = None,
) -> tuple[Any, Any, Any, Any, Any]: ...
