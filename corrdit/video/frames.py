"""Videos as people have them, brought to one form: uint8 `[T, H, W, 3]` frames that are given by slices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol, TypeAlias, cast

import numpy as np

from corrdit.video.info import Video
from corrdit.video.reading import StreamedVideo

ACCEPTED_FRAMES = (
    "accepted are uint8 or floating-point values in 0 to 1, [T, H, W, 3] or [T, 3, H, W] (arrays, tensors, or a list of"
    " frames), a list of PIL images, and the path of a video file or of a folder of frames"
)
ROUNDING = 1e-4
"""By which floating-point values may miss 0 and 1, as those of resized frames do."""
CHANNELS = 3
PICTURE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
"""Of PIL images with eight bits a channel or fewer."""


class Frames(Protocol):
    """A video uint8 `[T, H, W, 3]`: a tensor, an array, or an object with such a shape that gives frames by slices."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, part: slice, /) -> object: ...

    def __len__(self) -> int: ...


VideoLike: TypeAlias = "Frames | Video | Sequence[object] | str | os.PathLike[str]"
"""What `as_frames` takes."""


def as_frames(video: VideoLike, *, name: str = "video", min_frames: int = 1) -> Frames:
    """A video in any of the usual forms as uint8 `[T, H, W, 3]` frames in RGB.

    Args:
        video: uint8, or floating-point in 0 to 1; `[T, H, W, 3]` or `[T, 3, H, W]`, also as a batch of one; an array,
            tensor or anything with a shape and slices, of any strides, memory-mapped too; a list of frames as arrays,
            tensors or PIL images; what `read_video` or `StreamedVideo` give; or a path for these.
        name: of the argument, for messages.
        min_frames: fewest frames accepted.

    Returns:
        An object with `shape`, `len` and slices of consecutive frames that `torch.as_tensor` takes. Files and
        memory-mapped uint8 arrays are read as they are sliced.

    Raises:
        TypeError: no video at all.
        ValueError: another shape, values of another kind or range, a layout that can be read in two ways, too few
            frames, or as `read_video`.
    """
    if isinstance(video, (str, os.PathLike)):
        return StreamedVideo(video, min_frames=min_frames)
    given: object = video
    channels_last = isinstance(given, (Video, StreamedVideo))
    if isinstance(given, Video):
        given = given.frames
    elif isinstance(given, (list, tuple)):
        if len(given) == 1 and isinstance(given[0], (list, tuple)):
            given = given[0]  # the batch of one that pipelines give
        given, channels_last = _stacked(given, name)
    frames = _eight_bit(_one_layout(given, name, channels_last), name)
    if len(frames) < min_frames:
        count = "one frame" if len(frames) == 1 else f"{len(frames)} frames"
        needed = "tracking needs at least two" if min_frames == 2 else f"at least {min_frames} are needed"
        raise ValueError(f"{name} has {count}; {needed}")
    return frames


def _stacked(frames: Sequence[object], name: str) -> tuple[np.ndarray, bool]:
    """Frames of a list in one array, and whether it is known that they have their channels last."""
    if not frames:
        raise ValueError(f"{name} is a list without frames; {ACCEPTED_FRAMES}")
    from PIL import Image

    arrays = []
    for index, frame in enumerate(frames):
        if isinstance(frame, Image.Image):
            if frame.mode not in PICTURE_MODES:
                raise ValueError(f"{name} frame {index} is a picture of mode {frame.mode}; convert it to RGB first")
            arrays.append(np.asarray(frame.convert("RGB")))
        else:
            array = _in_memory(frame, f"{name} frame {index}")
            if not isinstance(array, np.ndarray):
                raise TypeError(f"{name} frame {index} is a {type(frame).__name__}; {ACCEPTED_FRAMES}")
            arrays.append(array)
        if (arrays[index].shape, arrays[index].dtype) != (arrays[0].shape, arrays[0].dtype):
            raise ValueError(
                f"{name} frame {index} is {describe(arrays[index])}, frame 0 {describe(arrays[0])}; all frames must be"
                " alike"
            )
    return np.stack(arrays), all(isinstance(frame, Image.Image) for frame in frames)


def _in_memory(array: object, name: str) -> object:
    """A tensor as an array, which shares its memory where it can; anything else as it is."""
    import torch

    if not isinstance(array, torch.Tensor):
        return array
    if array.layout is not torch.strided or array.device.type == "meta":
        kind = "meta" if array.device.type == "meta" else str(array.layout).removeprefix("torch.")
        raise ValueError(f"{name} is a {kind} tensor, which has no pixels to be read; {ACCEPTED_FRAMES}")
    array = array.detach().cpu()
    # numpy has no bfloat16
    return (array.float() if array.dtype == torch.bfloat16 else array).resolve_conj().numpy()


def _one_layout(given: object, name: str, channels_last: bool) -> Frames:
    """`[T, H, W, 3]` of whatever values, as it is or as a view with its axes in this order."""
    shape = tuple(getattr(given, "shape", ()))
    if not shape or not hasattr(given, "__getitem__"):
        raise TypeError(f"{name} is a {type(given).__name__}; {ACCEPTED_FRAMES}")
    given = _in_memory(given, name)
    batched = len(shape) == 5
    if batched and shape[0] != 1:
        raise ValueError(f"{name} is {describe(given)}, {shape[0]} videos; give one of them, such as {name}[0]")
    _, *size = shape[1:] if batched else shape
    last, first = len(size) == 3 and size[-1] == CHANNELS, len(size) == 3 and size[0] == CHANNELS
    if last and first and not channels_last:
        raise ValueError(
            f"{name} is {describe(given)}, which can be [T, H, W, 3] and [T, 3, H, W]; larger frames leave no doubt"
        )
    if not (last or first) or 0 in shape:
        raise ValueError(
            f"{name} must be [frames, height, width, 3] or [frames, 3, height, width], got {describe(given)};"
            f" {ACCEPTED_FRAMES}"
        )
    if batched or not last:
        array = given if isinstance(given, np.ndarray) else np.asarray(cast(Frames, given)[:])
        array = array[0] if batched else array
        given = array if last else array.transpose(0, 2, 3, 1)
    return cast(Frames, given)


def _eight_bit(frames: Frames, name: str) -> Frames:
    """The same frames as uint8; those that are stay where they are."""
    dtype = str(getattr(frames, "dtype", "of no dtype")).removeprefix("torch.")
    if dtype == "uint8":
        if not isinstance(frames, np.ndarray) or (frames.flags.writeable and min(frames.strides) > 0):
            return frames
        return _CopiedSlices(frames)
    if not dtype.lstrip("<>=|").startswith(("float", "f")):
        raise ValueError(f"{name} must be uint8 or floating-point, got {describe(frames)}; {ACCEPTED_FRAMES}")
    whole = np.empty(tuple(frames.shape), np.uint8)
    for index in range(len(frames)):
        frame = np.asarray(frames[index : index + 1], dtype=np.float32)
        low, high = float(frame.min()), float(frame.max())
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            raise ValueError(
                f"{name} must be uint8 from 0 to 255 or floating-point from 0 to 1, got {describe(frames)} with values"
                f" from {low:g} to {high:g} in frame {index}; scale it first, values from -1 to 1 by (x + 1) / 2"
            )
        whole[index] = np.rint(frame[0] * 255).clip(0, 255)
    return whole


class _CopiedSlices:
    """Slices, each copied, of a uint8 array that torch cannot share: reversed, read-only or memory-mapped."""

    dtype = np.dtype(np.uint8)

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape = array.shape

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.array(self._array[part], order="C")


def describe(value: object) -> str:
    """Kind, shape and dtype of an array, for messages."""
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    return kind if shape is None else f"{kind} {list(shape)} {getattr(value, 'dtype', '')}".rstrip()
