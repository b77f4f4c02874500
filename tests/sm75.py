"""What torch.compile would run on a T4, made and compiled without one.

torch's CPU build writes the Triton kernels of a function for a CUDA device that is only described to it, and
Triton's compiler makes machine code for sm_75. Uses internals of torch; tried with torch 2.13 and triton 3.6.
"""

import re
import tempfile
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo.device_interface as interfaces
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

T4 = {
    "major": 7,
    "minor": 5,
    "multi_processor_count": 40,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 1024,
    "warp_size": 32,
    "total_memory": 15_800_000_000,
    "gcnArchName": "",
}


def triton_kernels(function, *shapes: tuple[torch.dtype, tuple[int, ...]]) -> dict[str, str]:
    """Write the kernels of `function(*tensors)` for a T4, by inductor; return name -> source.

    Args:
        function: What to compile.
        shapes: dtype and shape of each tensor.
    """
    mode = FakeTensorMode()

    def on_cuda(tensor):
        return FakeTensor(
            mode,
            torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"),
            torch.device("cuda", 0),
        )

    with mode:
        inputs = [torch.empty(dims, dtype=dtype) for dtype, dims in shapes]
        graph = make_fx(
            lambda *tensors: tuple(function(*tensors)), decomposition_table=select_decomp_table()
        )(*inputs)
    for node in graph.graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            node.meta["val"] = on_cuda(node.meta["val"])
    inputs = [on_cuda(tensor) for tensor in inputs]
    with ExitStack() as stack:
        for patch in _a_t4():
            stack.enter_context(patch)
        lowering = GraphLowering(graph, example_inputs=inputs)
        for context in (DebugContext(), V.set_graph_handler(lowering), V.set_fake_mode(mode)):
            stack.enter_context(context)
        lowering.run(*inputs)
        code = lowering.codegen()[0].value
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S))


def _a_t4():
    """Patches under which torch believes in a T4."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    fields = {
        "multi_processor_count",
        "major",
        "regs_per_multiprocessor",
        "max_threads_per_multi_processor",
        "warp_size",
    }
    properties = DeviceProperties(type="cuda", index=0, cc=75, **{name: T4[name] for name in fields})
    worker, cuda = interfaces.CudaInterface.Worker, interfaces.CudaInterface
    yield mock.patch.object(DeviceProperties, "create", return_value=properties)
    yield mock.patch.object(
        worker, "get_device_properties", staticmethod(lambda device=None: SimpleNamespace(**T4))
    )
    yield mock.patch.object(cuda, "is_available", staticmethod(lambda: True))
    yield mock.patch.object(cuda, "get_compute_capability", staticmethod(lambda device=None: 75))
    yield mock.patch.object(torch.cuda, "is_available", return_value=True)
    yield mock.patch.object(torch.cuda, "current_device", return_value=0)
    yield mock.patch.object(torch.cuda, "get_device_capability", return_value=(7, 5))
    yield mock.patch.object(torch.cuda, "get_device_properties", return_value=SimpleNamespace(**T4))
    target = GPUTarget("cuda", 75, 32)
    active = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    yield _driver(driver, active)


@contextmanager
def _driver(driver, active):
    driver.set_active(active)
    try:
        yield
    finally:
        driver._active = None


def compile_for_t4(source: str, block: dict[str, int] | None = None) -> tuple[bytes, str]:
    """(machine code, assembly) of one kernel's source. block: sizes in place of inductor's first choice."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = source.replace("triton_helpers.set_driver_to_gpu()", "")  # there is none
    with ExitStack() as stack:
        for patch in _a_t4():
            stack.enter_context(patch)
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
            file.write(source)
        space = {"__file__": file.name, "__name__": "kernel"}
        exec(compile(source, file.name, "exec"), space)
        tuner = next(value for value in space.values() if hasattr(value, "triton_meta"))
        config = tuner.configs[0]
        constants = {
            name: value
            for name, value in {**config.kwargs, **(block or {})}.items()
            if name in tuner.fn.arg_names
        }
        signature = {
            name: "constexpr" if name in constants else kind
            for name, kind in tuner.triton_meta["signature"].items()
        }
        program = triton.compiler.ASTSource(
            fn=tuner.fn, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants
        )
        found = triton.compile(
            program, target=GPUTarget("cuda", 75, 32), options={"num_warps": config.num_warps}
        )
    return found.asm["cubin"], found.asm["ptx"]
