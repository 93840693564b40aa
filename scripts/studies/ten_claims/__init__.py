"""Ten claims about cross-entropy, hinge and distillation, each a study that anyone can rerun."""

from ten_claims import (
    alone,
    calibration,
    eight_bits,
    imbalance,
    margins,
    poison,
    redundancy,
    temperature,
    topk,
    transforms,
)

STUDIES = {  # in the order of the textbook; the last is the project's own
    module.STUDY.name: module.STUDY
    for module in (
        temperature,
        calibration,
        transforms,
        margins,
        poison,
        imbalance,
        redundancy,
        eight_bits,
        topk,
        alone,
    )
}
