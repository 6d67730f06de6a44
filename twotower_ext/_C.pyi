from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cuda: bool
    cuda_version: str | None
    architectures: list[str]
    cpu_features: list[str]
    cpu_isas: list[str]
    cpu_isa: str
    threads: int

def build_info() -> BuildInfo: ...
