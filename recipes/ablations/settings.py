"""What is compared, under which budget, and in which order it is run."""

from dataclasses import dataclass, field
from typing import Any

from ..moving_digits.build import LR_MULTIPLIERS


# The budget of every setting: the same clips in the same order of a seed, the same steps, the same batch.
STEPS, BATCH = 300, 16
LEARNING_RATE = 5e-4
LONGER_STEPS = 4 * STEPS  # of the table "longer": the clips four times
CURVE_STEPS, CURVE_CLIPS = 75, 120  # order is scored so often in a run, on so many of the test clips

# New parts learn ten times as fast as what starts from the backbone; of `separate` all layers are new.
RATES = {**LR_MULTIPLIERS, "vision_model.bt_adapter.layers.*.attn": 10.0}
RATES |= {f"vision_model.bt_adapter.layers.*.{part}": 10.0 for part in ("norm", "proj")}

ONLY_VTC = {"mbta_weight": 0.0, "mbca_weight": 0.0}
# Within this budget nothing reads order by captions alone (the first row of "order"), so that nothing could be told
# apart: all other settings contrast each clip with its reversed copy, too.
READS_ORDER = {"order_negatives": "reversed"}


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    Attributes:
        name: in the CSV.
        words: in the tables.
        fields: what differs from the shipped recipe; of the baseline's configs where `temporal` is among them.
        project: whether CLIP's projection of the video features learns too.
        pixels: whether it needs pixels, for its image encoder learns or is another one inside.
        steps: of training.
    """

    name: str
    words: str
    fields: dict[str, Any] = field(default_factory=dict)
    project: bool = False
    pixels: bool = False
    steps: int = STEPS

    @property
    def budget(self) -> str:
        return f"{self.steps}x{BATCH}"

    @property
    def learns(self) -> bool:
        return self.project or self.fields.get("temporal") != "frame_average"


def _ours(name: str, words: str, steps: int = STEPS, **fields) -> Setting:
    return Setting(name, words, {**READS_ORDER, **fields}, steps=steps)


def _rival(name: str, words: str, temporal: str, pixels: bool = False, project: bool = False, **fields) -> Setting:
    common = {"temporal": temporal, "adapter_layers": [2, 3], "max_frames": 8, "temperature": 0.05}
    return Setting(name, words, {**READS_ORDER, **common, **fields}, project, pixels)


_ALL = (
    _rival("frame_average", "frame-averaged CLIP", "frame_average"),
    _rival("separate", "separate-ST, CLIP frozen", "separate", time_embedding_init_std=0.5),
    _rival(
        "lone_branch", "branch without interaction", "branch", time_embedding_init_std=0.5, drop_path_rate=0.0,
        mask_ratio=0.5, fusion="sum", output_gate_scale=1.0,
    ),
    _ours("vtc", "branch with interaction", **ONLY_VTC),
    Setting("both", "all three losses, captions alone"),
    _ours("reversed", "all three losses, reversed clips too"),
    _ours("shuffled", "all three losses, reversed and shuffled clips too", order_negatives="reversed_and_shuffled"),
    _ours("mbta", "VTC + MBTA", mbca_weight=0.0),
    _ours("mbca", "VTC + MBCA", mbta_weight=0.0),
    *(_ours(f"mask{rate}", f"mask 0.{rate // 10}" if rate else "mask 0", mask_ratio=rate / 100)
      for rate in (0, 30, 70, 80, 90)),
    _ours("released_mask", "mask order as released", mask_order="released"),
    _ours("released_window", "temporal window as released", temporal_window="released"),
    _ours("released_gates", "gate scales as released", fusion_gate_scale=100.0, output_gate_scale=1e4),
    _rival("projected", "frame-averaged CLIP, projection learns", "frame_average", project=True),
    _rival("st_pooling", "spatial-temporal pooling, projection learns", "st_pooling", project=True),
    _rival("joint", "joint-ST, CLIP learns", "joint", pixels=True, frozen=False, time_embedding_init_std=0.1),
    _rival(
        "free_separate", "separate-ST, CLIP learns", "separate", pixels=True, frozen=False, time_embedding_init_std=0.5
    ),
    Setting("both_longer", "all three losses, captions alone, four times the steps", steps=LONGER_STEPS),
    _ours("reversed_longer", "all three losses, reversed clips too, four times the steps", steps=LONGER_STEPS),
    *(_ours(f"layers{K}", f"K = {K}", adapter_layers=list(range(4 - K, 4))) for K in (1, 3, 4)),
)  # fmt: skip
SETTINGS = {setting.name: setting for setting in _ALL}

# Rows from top to bottom; each is compared with the one above, or with the first where that is said.
TABLES = {
    "table6": ("frame_average", "separate", "lone_branch", "vtc"),
    "order": ("both", "reversed", "shuffled"),
    "longer": ("both_longer", "reversed_longer"),
    "table7": ("vtc", "mbta", "mbca", "reversed"),
    "fig4": ("mask0", "mask30", "reversed", "mask70", "mask80", "mask90"),
    "released": ("reversed", "released_mask", "released_window", "released_gates"),
    "table1": ("projected", "st_pooling", "joint", "free_separate", "separate", "vtc", "reversed"),
    "fig3": ("layers1", "reversed", "layers3", "layers4"),
}
# What a setting is called where its table varies one thing; all losses, mask 0.5 and K = 2 are the middle of each.
CALLED = {
    "table1": {"vtc": "branch with interaction, VTC", "reversed": "branch with interaction, all three losses"},
    "table7": {"vtc": "VTC", "reversed": "VTC + MBTA + MBCA"},
    "fig4": {"reversed": "mask 0.5"},
    "released": {"reversed": "as this package does it"},
    "fig3": {"reversed": "K = 2"},
}
AGAINST_FIRST = ("order", "longer", "table7", "fig4", "released")
TITLES = {
    "table6": "Table 6 in kind: the structure, trained with VTC",
    "order": "Reading order (beyond the paper)",
    "longer": "Reading order, four times the steps",
    "table7": "Table 7 in kind: the training tasks",
    "fig4": "Fig. 4 in kind: the mask",
    "released": "What the released code does otherwise",
    "table1": "Table 1 in kind: ways to model time",
    "fig3": "Fig. 3 in kind: layers of the branch",
}


def words(table: str, name: str) -> str:
    return CALLED.get(table, {}).get(name, SETTINGS[name].words)


def runs(tables: list[str], seeds: int) -> list[tuple[str, int]]:
    """(setting, seed), table by table with all its seeds, each run once."""
    wanted = [(name, seed) for table in tables for seed in range(seeds) for name in TABLES[table]]
    return list(dict.fromkeys(wanted))
