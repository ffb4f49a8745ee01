"""The one module that imports TensorRT: `tensorrt_rtx` (TensorRT for RTX) or `tensorrt` (enterprise), of one API.

Only calls that both have today are used: strongly typed networks, serialized plans, named tensors. TensorRT for RTX
builds without a GPU. Its runtime, and all of enterprise TensorRT, need one, and may end the process (no exception)
where there is none: callers ask `first_gpu` first, which asks the CUDA driver alone.
"""

import ctypes
import importlib
import importlib.util
import logging
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.engines.tensorrt_plan import NAMES, Gpu, Library, Profile, number

if TYPE_CHECKING:
    from tasks.engines.tensorrt import TensorRT

logger = logging.getLogger(__name__)

OLDEST = {"tensorrt_rtx": (1, 7), "tensorrt": (10, 12)}
EXTRAS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
DISTRIBUTIONS = {
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
}
DIAGNOSTICS = {  # of TensorRT for RTX, tensorrt_rtx.EngineInvalidityDiagnostics
    "VERSION_MISMATCH": "another version built it",
    "UNSUPPORTED_CC": "it was not built for this GPU's compute capability",
    "OLD_CUDA_DRIVER": "the CUDA driver is too old",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory",
    "MALFORMED_ENGINE": "the file is damaged",
    "CUDA_ERROR": "CUDA is not installed correctly",
}


def unusable(library: Library) -> str | None:
    """Why this machine cannot use `library`, and what to do; None if it can. Imports nothing."""
    absent = [name for name in ("onnx", library) if importlib.util.find_spec(name) is None]
    if absent:
        return (
            f"The engine 'tensorrt' needs {' and '.join(absent)}. Install it: pip install 'slimline[{EXTRAS[library]}]'"
        )
    installed = _installed_version(library)
    return None if installed is None else too_old(library, installed)


def too_old(library: Library, version: str) -> str | None:
    """Why `version` of `library` is refused; None if it is not."""
    oldest = OLDEST[library]
    if number(version) >= oldest:
        return None
    return (
        f"{NAMES[library]} must be {oldest[0]}.{oldest[1]} or later; {version} is installed. "
        f"Install it: pip install --upgrade 'slimline[{EXTRAS[library]}]'"
    )


def _installed_version(library: Library) -> str | None:
    """What the package's metadata say; None for one that pip did not install, whose version importing tells."""
    for distribution in DISTRIBUTIONS[library]:
        try:
            return distribution_version(distribution)
        except PackageNotFoundError:
            continue
    return None


def import_library(library: Library) -> Any:
    """The module, untyped.

    Raises:
        ValueError: its version is too old.
    """
    tensorrt: Any = importlib.import_module(library)
    if problem := too_old(library, str(tensorrt.__version__)):
        raise ValueError(problem)
    return tensorrt


@cache
def first_gpu() -> Gpu | None:
    """The first GPU, from the CUDA driver alone; None without a driver or a GPU."""
    major_attribute, minor_attribute = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    found = (  # every call returns 0 for success
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
        and driver.cuDeviceGetName(name, len(name), device) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(major), major_attribute, device) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(minor), minor_attribute, device) == 0
    )
    if not found:
        return None
    return Gpu(name=name.value.decode(errors="replace"), compute_capability=f"{major.value}.{minor.value}")


@cache
def listener(tensorrt: Any) -> Any:
    """The TensorRT logger of this process: hands messages to `logging`, and keeps errors and the list of layers.

    One for all builders and runtimes, because TensorRT takes the first that a process gives it and ignores others.
    """

    class Listener(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= tensorrt.ILogger.Severity.ERROR:
                self.errors.append(message.strip())
                logger.error("%s", message.strip())
            elif severity == tensorrt.ILogger.Severity.WARNING:
                logger.debug("%s", message.strip())
            elif message.startswith("Layers:"):
                self.layers.append(message)

        def forget(self) -> None:
            self.errors, self.layers = [], []

        def told(self) -> str:
            return "; ".join(self.errors[-3:]) or "it gives no reason"

    return Listener()


@dataclass(frozen=True)
class Built:
    """A plan, and what its builder said of it."""

    plan: bytes
    version: str
    products: dict[str, int]


def build_plan(graph: Path, profiles: tuple[Profile, Profile], options: "TensorRT") -> Built:
    """A serialized plan of an ONNX file.

    Raises:
        ValueError: the parser or the builder refuses the graph, or the timing cache is of another GPU or version.
    """
    tensorrt = import_library(options.library)
    log = listener(tensorrt)
    log.forget()
    builder = tensorrt.Builder(log)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise ValueError(refusal([parser.get_error(index) for index in range(parser.num_errors)]))
    config = builder.create_builder_config()
    configure(tensorrt, config, options)
    _timings = use_timing_cache(config, options.timing_cache) if options.timing_cache else None  # outlives the build
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for name, (smallest, typical, largest) in profile.items():
            shapes.set_shape(name, smallest, typical, largest)
        if config.add_optimization_profile(shapes) < 0:
            raise ValueError(f"TensorRT refuses the profile {profile}: {log.told()}. Choose other maxima.")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(not_built(log.told()))
    if options.timing_cache:
        write_cache(options.timing_cache, bytes(config.get_timing_cache().serialize()))
    return Built(plan=bytes(plan), version=str(tensorrt.__version__), products=products(log.layers))


def configure(tensorrt: Any, config: Any, options: "TensorRT") -> None:
    """Sets what `options` say of the plan in a builder's configuration."""
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # else float32 products lose 13 of 23 bits, which no graph says
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED  # the log then tells the types that layers read
    flags = {
        "REFIT": options.refit,
        "STRIP_PLAN": options.strip_weights,
        "VERSION_COMPATIBLE": options.version_compatible,
    }
    for flag, wanted in flags.items():
        if wanted:
            config.set_flag(getattr(tensorrt.BuilderFlag, flag))
    if options.hardware_compatibility:
        level = options.hardware_compatibility.upper()
        config.hardware_compatibility_level = getattr(tensorrt.HardwareCompatibilityLevel, level)
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, capability in enumerate(options.compute_capabilities):
            target = getattr(tensorrt.ComputeCapability, "SM" + capability.replace(".", ""))
            config.set_compute_capability(target, index)


def use_timing_cache(config: Any, file: Path) -> Any:
    """A timing cache with what `file` holds, or an empty one, attached to a builder's configuration.

    Raises:
        ValueError: `file` is no timing cache, or one of another GPU or version.
    """
    timings = config.create_timing_cache(read_cache(file))
    if timings is None or not config.set_timing_cache(timings, False):
        raise ValueError(
            f"A timing cache holds for one version of TensorRT on one kind of GPU; {file} is of another, or damaged. "
            "Name another file in `timing_cache`, or delete it."
        )
    return timings


def read_cache(file: Path) -> bytes:
    """What `file` holds; nothing where there is none yet."""
    return file.read_bytes() if file.exists() else b""


def write_cache(file: Path, content: bytes) -> None:
    """Replaces `file` in one step: another process reads the old cache or the new one, never half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.name + ".", delete=False) as stream:
        stream.write(content)
    Path(stream.name).replace(file)


NO_OPERATOR = "TensorRT has no such operator, or not with these inputs"
REFUSALS = {  # tensorrt.ErrorCode of the parser, which says little more than "false" of the first
    "UNSUPPORTED_NODE": NO_OPERATOR,
    "UNSUPPORTED_NODE_ATTR": "TensorRT does not know an attribute of it",
    "UNSUPPORTED_NODE_INPUT": "TensorRT does not take such an input",
    "UNSUPPORTED_NODE_DATATYPE": "TensorRT does not compute it in this type",
    "UNSUPPORTED_NODE_DYNAMIC": "TensorRT needs a fixed value there",
    "UNSUPPORTED_NODE_SHAPE": "TensorRT does not take such a shape",
    "INVALID_NODE": "its inputs do not fit together",
}


def refusal(errors: list[Any]) -> str:
    """The parser's errors, node by node, each with the module of the model that it belongs to."""
    shown = [f"{e.node_operator()} {e.node_name()!r} ({module_of(e.node_name())}): {_reason(e)}" for e in errors[:5]]
    more = f" (and {len(errors) - 5} more)" if len(errors) > 5 else ""
    return f"TensorRT cannot read {len(errors)} node(s) of the graph{more}: {'; '.join(shown)}"


def _reason(error: Any) -> str:
    """A parser's error in words, and what it says beyond them; the missing GPU of a build without one is no reason."""
    code = str(error.code()).rpartition(".")[2]
    lines = [line.strip() for line in error.desc().splitlines() if "cudaError 35" not in line]
    told = " ".join(line for line in dict.fromkeys(lines) if line and line != "false")
    if "Plugin not found" in told:  # what the parser looks for in the end
        return NO_OPERATOR
    words = REFUSALS.get(code, code)
    return f"{words}: {told}" if told else words


def not_built(told: str) -> str:
    """Why there is no plan, in words, from what TensorRT logged."""
    if out_of_memory(told):
        return (
            f"Building the plan needs more memory than there is: {told}. Free some, or compile with a smaller "
            "max_batch_size, max_prompt or max_length."
        )
    return f"TensorRT parses the graph but cannot build a plan from it: {told}."


def out_of_memory(told: str) -> bool:
    """Whether what TensorRT logged is about memory."""
    return re.search(r"out ?of ?memory|insufficient.{0,12} memory|cudaError 2\b", told, re.IGNORECASE) is not None


MODULES = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "gated": "mlp",
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "scores": "self_attn",
    "weights": "self_attn",
    "attended": "self_attn",
}
AROUND = {
    "embedding": "model.embed_tokens",
    "embedded": "model.embed_tokens",
    "lm_head": "lm_head",
    "logits": "lm_head",
    "last": "model.norm",
    "norm": "model.norm",
    "mask": "the attention mask",
    "bias": "the attention mask",
    "rows": "the rotary embedding",
    "cos": "the rotary embedding",
    "sin": "the rotary embedding",
}


def module_of(node: str) -> str:
    """The module of the model, as its checkpoint names it, that a node of the portable graph computes."""
    first, _, rest = node.partition(".")
    index, _, inner = rest.partition(".")
    if first == "layers" and index.isdigit():
        module = MODULES.get(inner.partition(".")[0])
        return f"model.layers.{index}" + (f".{module}" if module else "")
    if first == "present" and index.isdigit():
        return f"the KV cache of model.layers.{index}"
    return AROUND.get(first, "no module of the model")


WIDTHS = {"Int4": 4, "FP4": 4, "Int8": 8, "FP8": 8, "Half": 16, "BFloat16": 16, "Float": 32}
LAYER = re.compile(r"^Name: (.*?), LayerType: (\w+), Inputs: \[(.*?)\], Constants: \[(.*?)\], Outputs:", re.MULTILINE)


def products(layers: list[str]) -> dict[str, int]:
    """How many kernels multiply matrices of which types, from the builder's lists of layers.

    A kernel may compute several products at once (those of q, k and v). Weights that a product reads as they are stored
    have their own type here; weights that are unpacked before it have that of the activations.

    Returns:
        Counts by "activations × weights", as in {"Int8 × Int8": 8, "Half × Half": 6}.
    """
    counts: Counter[str] = Counter()
    for name, kind, inputs, constants in LAYER.findall("\n".join(layers)):
        if kind != "gemm" and not re.match(r"__myl_(?:[A-Z][a-z]+)*Fc(?:[A-Z_]|$)", name):
            continue
        types = re.findall(r"Datatype: (\w+)", inputs + constants)  # what is multiplied first, what scales it last
        if len(types) >= 2:  # a log of another form tells nothing, and the plan is as good
            counts[f"{types[0]} × {min(types[1:], key=lambda name: WIDTHS.get(name, 64))}"] += 1
    return dict(sorted(counts.items()))


def open_plan(tensorrt: Any, plan: bytes, *, host_code: bool) -> tuple[Any, Any]:
    """The runtime, which must outlive the engine, and the engine.

    Args:
        host_code: whether the plan brings the runtime of its version along, which a version-compatible one does.

    Raises:
        ValueError: TensorRT cannot read the plan here.
    """
    log = listener(tensorrt)
    log.forget()
    runtime = tensorrt.Runtime(log)
    if hasattr(runtime, "get_engine_validity"):  # TensorRT for RTX asks the plan's header alone
        validity, found = runtime.get_engine_validity(plan[: runtime.engine_header_size])
        if validity == tensorrt.EngineValidity.INVALID:
            raise ValueError(unreadable("; ".join(diagnosed(tensorrt, found)) or log.told()))
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ValueError(unreadable(log.told()))
    return runtime, engine


def diagnosed(tensorrt: Any, found: int) -> list[str]:
    """What the bits of `found` say in words."""
    members = tensorrt.EngineInvalidityDiagnostics.__members__
    return [words for name, words in DIAGNOSTICS.items() if name in members and found & int(members[name])]


def unreadable(told: str) -> str:
    """Why a plan cannot be loaded, in words, from what TensorRT says."""
    if out_of_memory(told) or "too little memory" in told:
        return (
            f"The plan needs more memory than the GPU has free: {told}. End what else uses the GPU, or compile with "
            "fewer bits or a smaller max_batch_size, max_prompt or max_length."
        )
    return (
        f"This TensorRT cannot read the plan: {told}. Compile it again with the version of TensorRT, and for the GPU, "
        "that are to run it."
    )


def refit_engine(tensorrt: Any, engine: Any, graph: Path) -> None:
    """Gives `engine` the weights of an ONNX file of the same shape.

    Raises:
        ValueError: the plan was not built for that, or the file's weights are not those of its layers.
    """
    log = listener(tensorrt)
    log.forget()
    refitter = tensorrt.Refitter(engine, log)
    parser = tensorrt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(graph)):
        raise ValueError(refusal([parser.get_error(index) for index in range(parser.num_errors)]))
    if not refitter.refit_cuda_engine():
        raise ValueError(f"TensorRT cannot give the plan the weights of {graph}: {log.told()}. Compile it again.")


@dataclass
class Kernels:
    """TensorRT for RTX's cache of kernels compiled at load, and the configuration; a context needs both alive."""

    config: Any
    cache: Any
    file: Path

    def keep(self) -> None:
        """Writes what was compiled into the file."""
        write_cache(self.file, bytes(self.cache.serialize()))


def create_context(tensorrt: Any, engine: Any, runtime_cache: Path | None) -> tuple[Any, Kernels | None]:
    """An execution context, and the cache of compiled kernels where a file for it is named.

    Raises:
        ValueError: the GPU has too little memory for the context.
    """
    log = listener(tensorrt)
    log.forget()
    kernels = None
    if runtime_cache:
        config = engine.create_runtime_config()
        kernels = Kernels(config, config.create_runtime_cache(), runtime_cache)
        content = read_cache(runtime_cache)
        if content and not kernels.cache.deserialize(content):
            logger.info("%s is of another GPU, driver or version; its kernels are compiled again.", runtime_cache)
        config.set_runtime_cache(kernels.cache)
        context = engine.create_execution_context(config)
    else:
        context = engine.create_execution_context()
    if context is None:
        raise ValueError(unreadable(log.told()))
    return context, kernels
