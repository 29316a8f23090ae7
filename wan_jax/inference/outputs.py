"""The files of a sampling command: one for each video, and a grid of all."""

import pathlib

import numpy as np

from wan_jax.inference.sampling import Batch, SampleRequest
from wan_jax.storage import media

GRID_WIDTH, GRID_HEIGHT = 4096, 8192  # pixels of the largest grid; larger ones are shrunk


class Outputs:
    """Writes videos as they are finished.

    Attributes:
        broken: the numbers of the videos that are not finite and were not written.
    """

    def __init__(self, out: pathlib.Path, request: SampleRequest, grid: bool):
        """out: file name with suffix. grid: whether all videos are also written to one file."""
        self.out, self.request = out, request
        self.fps = request.settings.fps
        self.broken: list[int] = []
        count = len(request.prompt_of)
        self.files = [out] if count == 1 else [self._named(f"{i:03d}") for i in range(count)]
        self.cells: dict[int, np.ndarray] | None = {} if grid else None

    def _named(self, ending: str) -> pathlib.Path:
        return self.out.with_name(f"{self.out.stem}_{ending}{self.out.suffix}")

    def check_writable(self) -> None:
        """Raise ValueError when a file cannot be written, before hours of work."""
        request = self.request
        files = [*self.files, self._named("grid")] if self.cells is not None else self.files
        for i, path in enumerate(files):
            if i == 0:
                media.check_writable(path, request.frames, request.height, request.width, self.fps)
            else:  # like the first one, but for its name
                media.check_no_folder(path)

    def write(self, batch: Batch) -> None:
        """Write the videos of a batch, and print their names."""
        for i, video, finite in zip(batch.rows, batch.videos.frames, batch.videos.finite):
            if not finite:
                self.broken.append(int(i))
                continue
            media.write(self.files[i], video, self.fps)
            print(f"{self.files[i]}  {self.request.prompts[self.request.prompt_of[i]]}", flush=True)
            if self.cells is not None:
                self.cells[int(i)] = np.stack(
                    [media.shrink(frame, self.shrinking) for frame in video]
                )

    @property
    def shrinking(self) -> int:
        """The whole factor by which videos are shrunk for the grid."""
        request = self.request
        return max(
            1,
            -(-request.samples * request.width // GRID_WIDTH),
            -(-len(request.prompts) * request.height // GRID_HEIGHT),
        )

    def write_grid(self) -> None:
        """Write all videos as one: a row for each prompt, with the prompt above it. Not where there
        is no video, or no grid was asked for.
        """
        if not self.cells:
            return
        samples = self.request.samples
        rows = [
            [self.cells.get(row * samples + column) for column in range(samples)]
            for row in range(len(self.request.prompts))
        ]
        path = self._named("grid")
        media.write(path, media.grid(rows, self.request.prompts), self.fps)
        print(f"{path}  {len(rows)} prompt(s) x {samples} sample(s)", flush=True)
