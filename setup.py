import hashlib
from pathlib import Path

from setuptools import Extension, find_packages, setup

#: the repository on GitHub; `python notebooks/set_slug.py OWNER/NAME` changes it here and in the notebooks
GITHUB = "OWNER/mixtral_offload"

NATIVE = Path("mixtral_offload/native")


def source_hash() -> str:
    """The hash that `mixtral_offload/weights/native.py` compares with the sources beside the library."""
    digest = hashlib.sha256()
    for path in sorted([*NATIVE.glob("*.c"), *NATIVE.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


#: kernels for CPUs, loaded by ctypes; where there is no C compiler, the package runs without
KERNELS = Extension(
    "mixtral_offload.native.library",
    sources=sorted(str(path) for path in NATIVE.glob("*.c")),
    depends=sorted(str(path) for path in NATIVE.glob("*.h")),
    define_macros=[("SOURCES", f'"{source_hash()}"')],
    extra_compile_args=["-O3", "-std=c11", "-fno-math-errno", "-ffp-contract=off"],
    optional=True,
)

setup(
    name="mixtral-offload",
    version="0.1.0",
    url=f"https://github.com/{GITHUB}",
    description="Run Mixture-of-Experts models whose experts do not fit on the device",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["mixtral_offload", "mixtral_offload.*"]),
    package_data={"mixtral_offload": ["py.typed", "demo/*", "demo/*/*", "native/*.c", "native/*.h"]},
    ext_modules=[KERNELS],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "transformers>=5.15",
        "hqq>=0.2.8",
        "huggingface-hub>=1.18",
        "safetensors>=0.5",
        "ipywidgets>=7.7",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "psutil>=5.9",
        "tqdm>=4.66",
        "xxhash>=3.5",
    ],
    entry_points={"console_scripts": ["mixtral-offload = mixtral_offload.apps.cli:main"]},
)
