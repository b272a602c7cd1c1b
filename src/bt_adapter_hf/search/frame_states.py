"""Features of many selections of the same frames: windows of a film, orders of a clip."""

import torch

from ..models.modeling_bt_adapter import BTAdapterModel


class FrameStates:
    """What the frozen image model says of each frame, computed once; the branch then runs per selection of frames.

    Windows of a film share its frames, and so do the orders of a clip that an evaluation compares:

        states = FrameStates(model)
        states.add(frames[:64])                            # (64, 3, H, W), as the processor makes them
        windows = torch.arange(0, 57, 4)[:, None] + torch.arange(8)
        features = states.features(windows)                # (15, P): windows of 8 frames, 4 of them shared
        states.forget(60)                                  # what later windows no longer name
        states.add(frames[64:128])                         # goes on with number 64

    so that memory follows the longest window and not the film. A frame takes as much as (K + 1) hidden states of the
    image model, for K branch layers: 5.3 MB at CLIP-L/14 in float32. Frames with equal pixels in one `add` pass the
    image model once.

    Features equal those of `get_video_features` on the frames of a window alone, up to the order in which a matrix
    product adds.
    """

    def __init__(self, model: BTAdapterModel):
        self.model = model
        self.start = 0  # the first frame that is kept
        self._states: dict[int, torch.Tensor] = {}  # (frames, C+N, D) each

    def __len__(self) -> int:
        """How many frames were added, forgotten ones included; the next one has this number."""
        return self.start + (len(next(iter(self._states.values()))) if self._states else 0)

    @torch.no_grad()
    def add(self, pixel_values: torch.Tensor) -> None:
        """Frames (F, 3, H, W) of any device, to be encoded."""
        tower = self.model.vision_model
        frames = pixel_values.to(self.model.device, tower.dtype)
        wanted = tower.config.num_hidden_layers  # for the pooled feature
        for n, state in tower.encode_frames(frames[None], wanted).items():
            kept = self._states.get(n)
            self._states[n] = state[0] if kept is None else torch.cat([kept, state[0]])

    def forget(self, before: int) -> None:
        """Lets go of the frames of lower number than `before`."""
        drop = min(max(before, self.start), len(self)) - self.start
        self._states = {n: state[drop:].clone() for n, state in self._states.items()}
        self.start += drop

    @torch.no_grad()
    def features(self, windows: torch.Tensor) -> torch.Tensor:
        """Features of windows.

        Args:
            windows: int64 (W, T), numbers of frames, in the order in which the window shows them.

        Returns:
            (W, P), projected and not normalised, as of `get_video_features`.

        Raises:
            IndexError: a frame that was not added yet, or is forgotten.
        """
        if windows.min() < self.start or windows.max() >= len(self):
            raise IndexError(
                f"Windows name the frames {int(windows.min())} to {int(windows.max())}; there are {self.start} to "
                f"{len(self) - 1}."
            )
        tower, config = self.model.vision_model, self.model.vision_model.config
        pooled = []
        for some in windows.to(self.model.device).split(max(1, config.frames_per_chunk // windows.shape[1])):
            chosen = {n: state[some - self.start] for n, state in self._states.items()}
            pooled.append(tower(backbone_states=chosen, return_dict=True).pooler_output)
        return self.model.visual_projection(torch.cat(pooled))
