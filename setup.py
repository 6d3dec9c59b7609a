from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

setup(
    name="vispec",
    version="0.1.0",
    description="Lossless tree speculative decoding for vision-language models (arXiv 2509.15235)",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["vispec", "vispec.*"]),
    package_data={
        "vispec": ["py.typed"],
        "vispec.train": ["*.json"],
        "vispec.demo": ["weights/**/*", "*.sh"],
        "vispec.serve": ["page.html"],
    },
    install_requires=[
        "torch>=2.6",
        "transformers>=4.51.3,<6",
        "accelerate>=1.0",
        "safetensors>=0.4.3",
        "datasets>=3.0",
        "pillow>=10.0",
        "numpy>=1.26",
        "tqdm>=4.66",
        "fschat>=0.2.36",
    ],
    entry_points={"lmms_eval.models": ["vispec = vispec.evaluation.lmms:manifest"]},
    extras_require={
        "demo": ["matplotlib>=3.8"],
        "lmms": ["lmms-eval>=0.7", "filelock<4"],  # lmms-eval 0.7 reaches into files of filelock that 4 has no more
        "grammar": ["lm-format-enforcer>=0.10.9"],  # JSON of `vispec.serve`
        "qwen": ["torchvision>=0.21"],  # the processors of Qwen's models, under transformers 5
        "ray": ["ray[serve]>=2.60"],  # several models at a time
        "train": ["tensorboard>=2.16"],
        "test": ["import-linter>=2.15", "pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.12", "scipy>=1.12"]
        + ["matplotlib>=3.8", "ray[serve]>=2.60", "av>=12.0", "httpx>=0.27", "openai>=1.40"]
        + ["lm-format-enforcer>=0.10.9"],
        "video": ["av>=12.0"],  # video files, for `vispec.generate --video`
    },
)
