"""Published top-1 accuracies on CIFAR-100's test pictures, in percent, and how they were come by.

Figures of the teacher, of the student alone and of the methods up to CRD are the means that Tian et
al. give (1910.10699, table in the authors' repository): 240 epochs, the last one, one view a step.
Those of DKD are of Zhao et al. (2203.08679; in the repository one pair has another name), by the
same protocol, of the epoch that was best on the test pictures.
Those of TTM, WTTM and DIST are of Zheng and Yang (2402.11148, table in their repository); DIST's as
they list them. Those of ReviewKD (2104.09044) are as Liang et al. list them (2305.17007, table in
the authors' repository), who have six of these pairs. Those of KD on standardised logits are of
Sun et al. (2403.01427, table in their repository), by the protocol of DKD.
Those of MLKD are of Jin et al. (CVPR 2023) as Sun et al. list them (2403.01427, table in their
repository); epochs are those of Jin et al.'s own configurations, of which the rate always falls
after 150, 180 and 210.
"""

from __future__ import annotations

from typing import NamedTuple

PAIRS = (
    *("wrn40_2_wrn16_2", "wrn40_2_wrn40_1", "r56_r20", "r110_r20", "r110_r32", "r32x4_r8x4"),
    *("vgg13_vgg8", "vgg13_mobilenetv2", "r50_mobilenetv2", "r50_vgg8", "r32x4_shufflev1"),
    *("r32x4_shufflev2", "wrn40_2_shufflev1"),
)
TIAN = {
    "teacher": (75.61, 75.61, 72.34, 74.31, 74.31, 79.42, 74.64,
                74.64, 79.34, 79.34, 79.42, 79.42, 75.61),
    "alone": (73.26, 71.98, 69.06, 69.06, 71.14, 72.50, 70.36,
              64.60, 64.60, 70.36, 70.50, 71.82, 70.50),
    "kd": (74.92, 73.54, 70.66, 70.67, 73.08, 73.33, 72.98,
           67.37, 67.35, 73.81, 74.07, 74.45, 74.83),
    "hint": (73.58, 72.24, 69.21, 68.99, 71.06, 73.50, 71.02,
             64.14, 63.16, 70.69, 73.59, 73.54, 73.73),
    "attention_transfer": (74.08, 72.77, 70.55, 70.22, 72.31, 73.44, 71.43,
                           59.40, 58.58, 71.84, 71.73, 72.73, 73.32),
    "sp": (73.83, 72.43, 69.67, 70.04, 72.69, 72.94, 72.68,
           66.30, 68.08, 73.34, 73.48, 74.56, 74.52),
    "rkd": (73.35, 72.22, 69.61, 69.25, 71.82, 71.90, 71.48,
            64.52, 64.43, 71.50, 72.28, 73.21, 72.21),
    "pkt": (74.54, 73.45, 70.34, 70.25, 72.61, 73.64, 72.88,
            67.13, 66.52, 73.01, 74.10, 74.69, 73.89),
    "crd": (75.48, 74.14, 71.16, 71.46, 73.48, 75.51, 73.94,
            69.73, 69.11, 74.30, 75.11, 75.65, 76.05),
}  # fmt: skip
ZHAO = {"r56_r20": 71.97, "r110_r32": 74.11, "r32x4_r8x4": 76.32, "wrn40_2_wrn16_2": 76.23,
        "wrn40_2_wrn40_1": 74.81, "vgg13_vgg8": 74.68, "r32x4_shufflev1": 76.45,
        "wrn40_2_shufflev1": 76.70, "vgg13_mobilenetv2": 69.71, "r50_mobilenetv2": 70.35,
        "r32x4_shufflev2": 77.07}  # fmt: skip
ZHENG = {
    "dist": (75.51, 74.73, 71.75, 71.65, 73.69, 76.31, 73.89,
             68.50, 68.66, 74.11, 76.34, 77.35, 76.40),
    "ttm": (76.23, 74.32, 71.83, 71.46, 73.97, 76.17, 74.33,
            68.98, 69.24, 74.87, 74.18, 76.57, 75.39),
    "wttm": (76.37, 74.58, 71.92, 71.67, 74.13, 76.06, 74.44,
             69.16, 69.59, 74.82, 74.37, 76.55, 75.42),
}  # fmt: skip
CHEN = {"r56_r20": 71.89, "wrn40_2_wrn40_1": 75.09, "r32x4_r8x4": 75.63, "r50_mobilenetv2": 69.89,
        "r32x4_shufflev1": 77.45, "r32x4_shufflev2": 77.78}  # fmt: skip
SUN = {"r32x4_r8x4": 76.62, "vgg13_vgg8": 74.36, "wrn40_2_wrn40_1": 74.37, "wrn40_2_wrn16_2": 76.11,
       "r56_r20": 71.43, "r110_r32": 74.17, "r110_r20": 71.48, "r32x4_shufflev2": 75.56,
       "vgg13_mobilenetv2": 68.61, "r50_mobilenetv2": 69.02}  # fmt: skip
JIN = {"r56_r20": 72.19, "r110_r32": 74.11, "r32x4_r8x4": 77.08, "wrn40_2_wrn16_2": 76.63,
       "wrn40_2_wrn40_1": 75.35, "vgg13_vgg8": 75.18, "vgg13_mobilenetv2": 70.57,
       "r50_mobilenetv2": 71.04, "r32x4_shufflev2": 78.44}  # fmt: skip


DIFFERS = {  # in what the published method is another than the one here
    "hint": "a regressor of three layers",
    "attention_transfer": "means over each map",
    "sp": "similarity of maps",
    "crd": "16,384 negatives from a memory",
    "ttm": "β of each pair's own, here vgg13's with vgg8",
    "wttm": "β of each pair's own, here vgg13's with vgg8",
    "reviewkd": "one more map of some models",
    "mlkd_two_views": "the strong one by RandAugment, and a loss that leaves parts of it out",
}


BEST_ON_TEST = "best on test"


class Published(NamedTuple):
    """A published figure.

    Attributes:
        top1: in percent.
        protocol: how it was come by.
    """

    top1: float
    protocol: str

    @property
    def is_best_on_test(self) -> bool:
        """Whether it is of the epoch that was best on the test pictures, which none here is."""
        return BEST_ON_TEST in self.protocol


FIGURES = {  # method → by pair, and the protocol
    **{method: (dict(zip(PAIRS, row, strict=True)), "1910.10699: 240 epochs, last, one view")
       for method, row in TIAN.items()},
    **{method: (dict(zip(PAIRS, row, strict=True)), "2402.11148: 240 epochs, one view")
       for method, row in ZHENG.items()},
    "reviewkd": (CHEN, "2104.09044: 240 epochs, one view"),
    "dkd": (ZHAO, f"2203.08679: 240 epochs, {BEST_ON_TEST}, one view"),
    "standardized_kd": (SUN, f"2403.01427: 240 epochs, {BEST_ON_TEST}, one view"),
    "mlkd_two_views": (JIN, f"CVPR 2023: {{epochs}} epochs, {BEST_ON_TEST}, two views"),
}  # fmt: skip
LONGER = ("mobilenetv2", "shufflev2")  # students that Jin et al. train for 480 epochs


def published(pair: str, method: str) -> Published | None:
    """Return what was published of a method (or `teacher`, or the student `alone`) on a pair."""
    figures, protocol = FIGURES.get(method, ({}, ""))
    if pair not in figures:
        return None
    told = [protocol.format(epochs=480 if pair.endswith(LONGER) else 240), DIFFERS.get(method)]
    return Published(figures[pair], ", ".join(filter(None, told)))
