"""The classifier: built, loaded, described, and run on fixed batches.

Whatever builds it, from here on a classifier is pixels in, penultimate feature, logits and block norms out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import imports
from pipeline.columns import BLOCK_NORM, FEATURE, LOGITS, Pixels
from pipeline.config import schema
from pipeline.errors import UserError
from pipeline.network import heads, sources, taps
from pipeline.network.description import WRONG_SIZE, Description, Layout, Taps

K = TypeVar("K")
Traced = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Penultimate feature (N, D), logits (N, C), and FeatureNorm (N,) by block."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

_FLAGS: tuple[tuple[Any, str, bool], ...] = (
    (torch.backends.cuda.matmul, "allow_tf32", False),
    (torch.backends.cudnn, "allow_tf32", False),
    (torch.backends.cudnn, "deterministic", True),
    (torch.backends.cudnn, "benchmark", False),
)
"""With these a GPU multiplies float32 as such, and always by the same algorithm: the bits can be repeated."""


_FULL = re.compile("out of memory|ALLOC(ATION)?_FAILED")
"""In what torch, CUDA and its libraries (cuBLAS, cuDNN, cuSOLVER) say of a GPU without room."""


@dataclass(frozen=True)
class Classifier(Description):
    """A classifier in eval mode."""

    module: nn.Module
    device: str = "cpu"
    precision: str = "fp32"
    channels_last: bool = False
    compiled: Callable[[Tensor], Traced] | None = None
    """The traced network through `torch.compile`; None if it is not compiled."""

    def images(self, pixels: Pixels, size: int | None = None) -> Tensor:
        """Normalise (N, H, W, channels) uint8 to (`size` or N, channels, H, W) float32 on the device.

        The last image stands in for missing ones: see `columns.padded`.
        """
        shape = size or len(pixels), *pixels.shape[1:]
        copy = torch.empty(shape, dtype=torch.uint8, pin_memory=self._on_gpu)  # a view's strides: other bits
        rows = copy.numpy()
        rows[: len(pixels)], rows[len(pixels) :] = pixels, pixels[-1]
        tensor = copy.to(self.device, non_blocking=True)
        return self.normalise(tensor.permute(0, 3, 1, 2).float().div_(255))

    @property
    def _on_gpu(self) -> bool:
        """Whether what is copied to the device is to lie in pinned memory: nobody then waits for the copy."""
        return self.device == "cuda"

    def normalise(self, pixels: Tensor) -> Tensor:
        """Apply the transform's mean and std to (N, channels, H, W) float32 in [0, 1], in place."""
        mean, std = (
            torch.tensor(values, pin_memory=self._on_gpu).to(self.device, non_blocking=True).view(1, -1, 1, 1)
            for values in (self.transform.mean, self.transform.std)
        )
        return pixels.sub_(mean).div_(std)

    def forward(self, pixels: Pixels, blocks: bool = True) -> dict[str, NDArray[np.float32]]:
        """Feature (N, D), logits (N, C) and, if there are blocks and `blocks` is set, FeatureNorm (N, B)."""
        return self.begin(pixels, len(pixels), blocks)()

    def begin(
        self, pixels: Pixels, size: int, blocks: bool = True
    ) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Begin the same for images brought to `size`; what is returned waits for it and gives the arrays."""
        with fitting(size):
            return self._begin(self.images(pixels, size), blocks)

    def forward_images(self, images: Tensor, blocks: bool = True) -> dict[str, NDArray[np.float32]]:
        """The same as `forward` for normalised images (N, channels, H, W); not `fitting` by itself."""
        return self._begin(images, blocks)()

    def _begin(self, images: Tensor, blocks: bool) -> Callable[[], dict[str, NDArray[np.float32]]]:
        with torch.inference_mode():
            return fetching(self.columns(images, blocks))

    def columns(self, images: Tensor, blocks: bool = True) -> dict[str, Tensor]:
        """The same as float32 tensors, where they were computed."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        feature, logits, norms = (self.compiled or partial(self._trace, blocks=blocks))(images)
        result = {FEATURE: feature.float(), LOGITS: self._precise(feature, logits).float()}
        if blocks and norms:
            result[BLOCK_NORM] = torch.stack([norms[name] for name in self.taps.blocks], dim=1)
        return result

    def answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Feature (N, D) and logits (N, C), float32, of normalised images; gradients flow if they are on."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        feature, logits, _ = self._trace(images, blocks=False)
        return feature.float(), self._precise(feature, logits).float()

    def _precise(self, feature: Tensor, logits: Tensor) -> Tensor:
        """Logits in float32, computed again from the feature where the body ran in half precision."""
        if self.precision == "fp32":
            return logits
        weight, bias = taps.head_weight(self.module.get_submodule(self.taps.head))
        return feature.float() @ weight.float().T + bias.float()

    def _trace(self, images: Tensor, blocks: bool) -> Traced:
        """Penultimate feature, logits and block norms of one forward pass."""
        feature: list[Tensor] = []
        norms: dict[str, Tensor] = {}
        hooks: dict[str, Any] = {}
        for name, place in zip(self.taps.blocks, self.taps.layouts, strict=True) if blocks else ():
            hooks[name] = _norm_into(norms, name, place)
        with self.tapped(feature), taps.hooked(self.module, hooks), self._autocast():
            logits = self.module(images)
        return feature[0], logits, norms

    def _autocast(self) -> AbstractContextManager[Any]:
        """Where the body of the network runs in half precision; nothing for fp32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, _DTYPES[self.precision])

    def tuned(self, settings: schema.Extract, compiled: bool = False) -> Classifier:
        """The same classifier in the configured precision and memory layout.

        Args:
            settings: precision and memory layout.
            compiled: whether to run it through `torch.compile`; its module then keeps our hooks, and is for
                nothing but extraction.
        """
        if settings.channels_last:
            with fitting():
                self.module.to(memory_format=torch.channels_last)
        tuned = replace(self, precision=settings.precision, channels_last=settings.channels_last)
        return replace(tuned, compiled=tuned._compile()) if compiled else tuned

    def _compile(self) -> Callable[[Tensor], Traced]:
        """The traced forward pass as one compiled function, with hooks that stay: new ones recompile."""
        seen: dict[str, Tensor] = {}
        working: list[bool] = []

        def keep(head: nn.Module, inputs: Any) -> None:
            seen[FEATURE] = taps.penultimate(head, inputs[0])

        self.module.get_submodule(self.taps.head).register_forward_pre_hook(_while(working, keep))
        norms: dict[str, Tensor] = {}
        for name, place in zip(self.taps.blocks, self.taps.layouts, strict=True):
            self.module.get_submodule(name).register_forward_hook(
                _while(working, _norm_into(norms, name, place))
            )

        def traced(images: Tensor) -> Traced:
            seen.clear()
            norms.clear()
            with self._autocast():
                logits = self.module(images)
            result = seen[FEATURE], logits, dict(norms)
            seen.clear()  # empty before and after: what the compiler guards on is always the same
            norms.clear()
            return result

        compiled = torch.compile(traced, dynamic=False)

        def run(images: Tensor) -> Traced:
            working.append(True)  # seen also by layers that the compiler leaves alone
            try:
                result: Traced = compiled(images)
                return result
            finally:
                working.clear()

        return run

    @contextmanager
    def tapped(self, feature: list[Tensor]) -> Iterator[None]:
        """Append the penultimate feature (N, D) of every forward pass to `feature`."""

        def keep(head: nn.Module, inputs: Any) -> None:
            feature.append(taps.penultimate(head, inputs[0]))

        handle = self.module.get_submodule(self.taps.head).register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()


def load(model: schema.Model, seed: int, device: str = "cpu") -> Classifier:
    """Build a classifier, load its weights and find its taps.

    Raises:
        UserError: unknown name, weights that are missing or do not fit, taps that cannot be found, no such
            device, or one without room for the network.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is not available here. Set it to cpu.")
    torch.manual_seed(seed)
    built = sources.build(model)
    module, transform = built.module, built.transform
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError(taps.SCRIPTED)
    module.eval().requires_grad_(False)
    kept = _to_float32(module)
    try:
        probe = torch.rand(3, transform.channels, transform.crop, transform.crop)
        probe[2] = 10 * torch.randn_like(probe[2])  # what only happens to large values shows here
        found = _tapped(module, probe, model)
    except UserError:
        raise
    except WRONG_SIZE as error:
        cure = "Check model.transform."
        if kept is not None:
            cure = f"Its parameters were {kept} and are float32 here: leave casts out of its forward()."
        raise UserError(
            f"model: it does not run on {transform.channels} x {transform.crop} x {transform.crop} images: "
            f"{error}. {cure}"
        ) from error
    code = repr(module).encode() + built.code + _sources(module)
    weight, bias = taps.head_weight(module.get_submodule(found.head))
    classifier = Classifier(
        transform,
        found,
        _digest(module),
        hashlib.sha256(code).hexdigest(),
        _answers(module, probe.shape),
        (weight.float().numpy().copy(), bias.float().numpy().copy()),
        module,
        device,
    )
    with fitting():
        module.to(device)
    return classifier


def _tapped(module: nn.Module, probe: Tensor, model: schema.Model) -> Taps:
    """The taps of a network; two heads that it averages become one."""
    blocks = None if model.blocks == "auto" else model.blocks
    try:
        return taps.find(module, probe, model.head, blocks)
    except UserError:
        if model.head != "auto" or not heads.merge(module, probe):
            raise
    return taps.find(module, probe, model.head, blocks)


def _to_float32(module: nn.Module) -> str | None:
    """Make float32 of a network all of whose parameters have another precision, which is returned.

    Values of half precision are the same in float32, those of double precision are rounded; what the network
    runs in is `extract.precision`.
    """
    found = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    if not found or torch.float32 in found:
        return None
    module.float()
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))


def _answers(module: nn.Module, shape: torch.Size) -> NDArray[np.float32]:
    """Logits of fixed noise: they change with functions that a network's source imports."""
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits: NDArray[np.float32] = module(noise).float().numpy()
    return logits


def _sources(module: nn.Module) -> bytes:
    """The files that define the classes a model is made of, but for torch's own."""
    classes = {type(part) for part in module.modules()}
    own = sorted((kind for kind in classes if not kind.__module__.startswith("torch.")), key=repr)
    return b"".join(imports.source_of(kind) for kind in own)


def feature_norm(maps: Tensor) -> Tensor:
    """FeatureNorm of a block (Yu et al., CVPR 2023, eq. 1): mean over channels of the L2 norm of the ReLU.

    Args:
        maps: (N, M, H, W), the block's output with its channels at axis 1, any floating dtype; reduced in
            float32.

    Returns:
        (N,) float32, >= 0.
    """
    return maps.float().relu().square_().sum(dim=(2, 3)).sqrt_().mean(dim=1)


def _norm_into(norms: dict[str, Tensor], name: str, place: Layout) -> Any:
    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        norms[name] = feature_norm(place.maps(output))

    return keep


def _while(working: list[bool], hook: Any) -> Any:
    """The hook, but where the module is called for something else."""

    def call(*arguments: Any) -> None:
        if working:
            hook(*arguments)

    return call


def fetching(tensors: Mapping[K, Tensor]) -> Callable[[], dict[K, NDArray[np.float32]]]:
    """Begin to copy tensors to the host; what is returned waits for them and gives the arrays.

    It does not wait for what the GPU is asked to do afterwards.
    """
    copies = {name: each.to("cpu", non_blocking=True) for name, each in tensors.items()}
    done = None
    if any(each.is_cuda for each in tensors.values()):
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()

    def fetch() -> dict[K, NDArray[np.float32]]:
        if done is not None:
            done.synchronize()
        return {name: each.numpy() for name, each in copies.items()}

    return fetch


@contextmanager
def fitting(images: int = 0, key: str = "extract.batch_size") -> Iterator[None]:
    """In the block, a GPU without room for a batch of so many images is a mistake in the config.

    Args:
        images: how many; 0 = there is none yet, and the network alone does not fit.
        key: of the config, that says how many.

    Raises:
        UserError: instead of `torch.OutOfMemoryError`, or of what CUDA and its libraries say.
    """
    try:
        yield
    except RuntimeError as error:
        if not _FULL.search(str(error)):
            raise
        reason = re.split(" Including|\n", str(error))[0].rstrip(".;")
        what, cure = f"{key}: {images} images do", "Lower it"
        if not images:
            what = "model: the network does"
            cure = "Take a GPU with more, end what else is on it, or set extract.device to cpu"
        raise UserError(
            f"{what} not fit into the memory of the GPU ({reason}). {cure}; where actors share a GPU, raise "
            "extract.gpus_per_actor."
        ) from None


def _digest(module: nn.Module) -> str:
    sha = hashlib.sha256()
    tensors = {**module.state_dict(), **dict(module.named_buffers())}  # not all buffers are in the state
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def make_reproducible(threads: int) -> None:
    """Set, for this process, what its bits depend on: the number of threads, and how a GPU computes."""
    torch.set_num_threads(threads)
    for where, name, value in _FLAGS:
        setattr(where, name, value)


def settings() -> Callable[[], None]:
    """What gives torch back those that it has now and `make_reproducible` changes."""
    threads, flags = torch.get_num_threads(), [getattr(where, name) for where, name, _ in _FLAGS]

    def give_back() -> None:
        torch.set_num_threads(threads)
        for (where, name, _), value in zip(_FLAGS, flags, strict=True):
            setattr(where, name, value)

    return give_back


give_back_first = settings()
"""Gives torch back the settings that it had when this was imported."""
