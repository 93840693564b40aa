"""Losses with helper networks, which are trained beside the student and are no part of it.

A helper is made for the two models. It is in checkpoints, learns with the student's optimiser
without weight decay, and is left out of a student's bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.losses._common import (
    at_least_one,
    labels,
    logit_pair,
    matrix_product,
    non_negative,
    positive,
    require,
    upcast,
)
from distill.losses.features import hierarchical_context, hint
from distill.losses.transport import class_costs, wasserstein_kd


class ModelInfo(NamedTuple):
    """What a helper is made for.

    Attributes:
        channels: of the feature maps, one for each stage that is compared.
        embedding: D, how many numbers the classifier reads.
        classes: K.
        classifier: the layer that makes logits of embeddings; None where that is not one linear
            layer.
    """

    channels: tuple[int, ...]
    embedding: int
    classes: int
    classifier: nn.Linear | None = None


def linear_classifier(info: ModelInfo, role: str) -> nn.Linear:
    """Return a model's classifier, refusing what is not one linear layer with a bias."""
    layer = info.classifier
    if layer is None or layer.bias is None or layer.in_features != info.embedding:
        raise ValueError(f"the {role}'s classifier is not one linear layer with a bias")
    return layer


class Hint(nn.Module):
    r"""`hint` of the student's maps, projected to the teacher's channels by 1×1 convolutions.

    Args:
        student: the student.
        teacher: the teacher.

    Reference:
        Romero et al., FitNets, 1412.6550.
    """

    def __init__(self, student: ModelInfo, teacher: ModelInfo) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Conv2d(ours, theirs, kernel_size=1, bias=False)
            for ours, theirs in zip(student.channels, teacher.channels, strict=True)
        )

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        """Return one value per example, `[N]`."""
        pairs = zip(self.projections, student_maps, strict=True)
        return hint([project(ours) for project, ours in pairs], teacher_maps)


class Review(nn.Module):
    r"""ReviewKD: each stage of the teacher is compared with the student's from there to the end.

    From the embedding back to the first stage, a fusion mixes a stage's map with what the deeper
    ones made, by two attention maps, and projects it to the teacher's channels and size; the value
    is the sum over stages and the embedding of `hierarchical_context`. The authors' code compares
    the teacher's maps before their last activation; here they are after it, as timm gives them.

    Args:
        student: the student; name all stages, `objective.stages=[0,1,2]`.
        teacher: the teacher, of as many stages.
        width: the most channels in which maps are fused; fewer if the embedding is narrower.

    Reference:
        Chen et al., Distilling Knowledge via Knowledge Review, 2104.09044.
    """

    def __init__(self, student: ModelInfo, teacher: ModelInfo, width: int = 512) -> None:
        super().__init__()
        ours = (*student.channels, student.embedding)
        theirs = (*teacher.channels, teacher.embedding)
        width = min(at_least_one("width", width), student.embedding)
        self.fusions = nn.ModuleList(
            _Fusion(channels, width, target, level < len(ours) - 1)
            for level, (channels, target) in enumerate(zip(ours, theirs, strict=True))
        )

    def forward(
        self,
        student_maps: Sequence[Tensor],
        teacher_maps: Sequence[Tensor],
        student_embedding: Tensor,
        teacher_embedding: Tensor,
    ) -> Tensor:
        """Return one value per example, `[N]`."""
        ours = [*student_maps, student_embedding[..., None, None]]
        theirs = [*teacher_maps, teacher_embedding[..., None, None]]
        deeper: Tensor | None = None
        values = []
        for level in reversed(range(len(ours))):
            size = (theirs[level].shape[-2], theirs[level].shape[-1])
            out, deeper = self.fusions[level](ours[level], deeper, size)
            values.append(hierarchical_context(out, theirs[level]))
        return torch.stack(values).sum(0)


class _Fusion(nn.Module):
    def __init__(self, channels: int, width: int, out_channels: int, fuses: bool) -> None:
        super().__init__()
        self.enter = _convolution(channels, width, 1)
        self.leave = _convolution(width, out_channels, 3)
        self.attention = nn.Conv2d(2 * width, 2, kernel_size=1) if fuses else None

    def forward(
        self, own: Tensor, deeper: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        fused = self.enter(own)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[-2:], mode="nearest")
            shares = self.attention(torch.cat([fused, deeper], dim=1)).sigmoid()
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        if fused.shape[-2:] != size:
            fused = F.interpolate(fused, size, mode="nearest")
        return self.leave(fused), fused


def _convolution(channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


class MaskedMaps(nn.Module):
    r"""ViTKD: the first maps are to be the teacher's, and the last is to be made from half of it.

    `Σ_l Σ (W_l·s_l − z_l)² + β·Σ m·(G(masked(W·s)) − z)²/share`, summed over channels and places:
    l goes over all maps but the last, of which a share of the places, drawn for each sample, is
    replaced by a learned token; G is two 3×3 convolutions with a ReLU between, and m marks the
    places that were replaced. In evaluation the same places are drawn each time. The authors
    project only where widths differ.

    Args:
        student: the student.
        teacher: the teacher, whose maps are as large.
        share: of the places that are masked, in (0, 1).
        beta: β ≥ 0.

    Raises:
        ValueError: for a share or β out of range.

    Reference:
        Yang et al., ViTKD, 2209.02432; stages [0, 1, -1] there, α = 3e-5 and β = 0.1.
    """

    def __init__(
        self, student: ModelInfo, teacher: ModelInfo, share: float = 0.5, beta: float = 0.1
    ) -> None:
        super().__init__()
        require(0 < share < 1, f"share must lie between 0 and 1, got {share}")
        self.share, self.beta = float(share), non_negative("beta", beta)
        self.projections = nn.ModuleList(
            nn.Conv2d(ours, theirs, kernel_size=1)
            for ours, theirs in zip(student.channels, teacher.channels, strict=True)
        )
        width = teacher.channels[-1]
        self.token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.generate = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
        )

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        """Return one value per example, `[N]`."""
        pairs = zip(self.projections, student_maps, strict=True)
        ours = [project(maps) for project, maps in pairs]
        theirs = [upcast(maps.detach()) for maps in teacher_maps]
        for one, other in zip(ours, theirs, strict=True):
            require(
                one.shape == other.shape,
                f"maps of {list(one.shape[2:])} and {list(other.shape[2:])} places do not compare",
            )
        masked = self._masked(ours[-1])
        made = self.generate(torch.where(masked, self.token.to(ours[-1].dtype), ours[-1]))
        value = self.beta / self.share * _squares(torch.where(masked, made - theirs[-1], 0.0))
        for one, other in zip(ours[:-1], theirs[:-1], strict=True):
            value = value + _squares(upcast(one) - other)
        return value

    def _masked(self, maps: Tensor) -> Tensor:
        """Return which places of each sample are masked, bool `[N, 1, H, W]`."""
        count, _, height, width = maps.shape
        if self.training:
            noise = torch.rand(count, height * width, device=maps.device)
        else:
            fixed = torch.Generator().manual_seed(0)
            noise = torch.rand(count, height * width, generator=fixed).to(maps.device)
        rank = noise.argsort(dim=1).argsort(dim=1)
        kept = int(height * width * (1 - self.share))
        return (rank >= kept).view(count, 1, height, width)


def _squares(differences: Tensor) -> Tensor:
    return upcast(differences).square().flatten(1).sum(dim=1)


class Contrast(nn.Module):
    r"""CRD: a student's embedding is to be next to the teacher's of the same picture.

    `−log e^{u_n·v_n/τ} / Σ_m e^{u_n·v_m/τ} − log e^{v_n·u_n/τ} / Σ_m e^{v_n·u_m/τ}` with u and v
    the two embeddings, each projected to `width` numbers and to length 1. The sum is over the
    batch and, in the first term, over a queue of the teacher's last embeddings; other pictures of
    n's class are left out. The paper's estimator draws 16,384 negatives from a memory of all
    training pictures; this one needs none, and with `queue` none that grows with the data.

    Args:
        student: the student.
        teacher: the teacher.
        width: how many numbers are compared.
        tau: τ > 0.
        queue: how many embeddings of earlier batches are negatives, too.

    Raises:
        ValueError: for a τ or a queue out of range.

    Reference:
        Tian et al., Contrastive Representation Distillation, 1910.10699. Negatives of the batch:
        van den Oord et al., 1807.03748; a queue of them: He et al., 1911.05722.
    """

    queued: Tensor
    queued_labels: Tensor

    def __init__(
        self,
        student: ModelInfo,
        teacher: ModelInfo,
        width: int = 128,
        tau: float = 0.07,
        queue: int = 0,
    ) -> None:
        super().__init__()
        require(isinstance(queue, int) and queue >= 0, f"queue must be 0 or more, got {queue}")
        self.tau = positive("tau", tau)
        self.ours = nn.Linear(student.embedding, at_least_one("width", width))
        self.theirs = nn.Linear(teacher.embedding, width)
        self.register_buffer("queued", torch.zeros(queue, width))
        self.register_buffer("queued_labels", torch.full((queue,), -1))

    def forward(
        self, student_embedding: Tensor, teacher_embedding: Tensor, target: Tensor
    ) -> Tensor:
        """Return one value per example, `[N]`."""
        target = labels(student_embedding, target)
        ours = F.normalize(upcast(self.ours(student_embedding)), dim=1)
        embedding = upcast(teacher_embedding.detach()).to(self.theirs.weight.dtype)
        theirs = F.normalize(upcast(self.theirs(embedding)), dim=1)
        # What the queue holds is read before it is written: autograd keeps what it multiplied.
        others, their_labels = self.queued.clone(), self.queued_labels.clone()
        value = self._nearness(ours, torch.cat([theirs, others]), target, their_labels)
        value = value + self._nearness(theirs, ours, target, target[:0])
        if self.training and len(others):
            self.queued.copy_(torch.cat([theirs.detach().to(others), others])[: len(others)])
            self.queued_labels.copy_(torch.cat([target, their_labels])[: len(others)])
        return value

    def _nearness(self, own: Tensor, all_of: Tensor, target: Tensor, more: Tensor) -> Tensor:
        """Return the cross-entropy of finding row n of `own` at place n of `all_of`."""
        count, candidates = len(own), torch.cat([target, more])
        same = target[:, None] == candidates
        absent = candidates < 0  # of a queue that is not full
        itself = torch.eye(count, len(candidates), dtype=torch.bool, device=own.device)
        scores = (matrix_product(own, all_of.T) / self.tau).masked_fill(
            (same | absent) & ~itself, -torch.inf
        )
        return F.cross_entropy(scores, torch.arange(count, device=own.device), reduction="none")


class Projector(nn.Module):
    r"""SRD: a linear projector, batch normalisation and a soft maximum of the differences.

    `log Σ_n Σ_d |BN(W·s_n)_d − BN(z_n)_d|^a` of embeddings s and z, in which BN makes each number's
    mean 0 and its variance 1 over the batch. It is one value of a batch, which each of its samples
    is given.

    Args:
        student: the student.
        teacher: the teacher.
        power: a; the authors take 4.

    Raises:
        ValueError: for a power that is not positive.

    Reference:
        Miles and Mikolajczyk, Understanding the Role of the Projector in Knowledge Distillation,
        2303.11098.
    """

    def __init__(self, student: ModelInfo, teacher: ModelInfo, power: float = 4.0) -> None:
        super().__init__()
        self.power = positive("power", power)
        self.project = nn.Linear(student.embedding, teacher.embedding)
        # As the authors have it, ten times torch's own.
        self.ours = nn.BatchNorm1d(teacher.embedding, eps=1e-4, affine=False)
        self.theirs = nn.BatchNorm1d(teacher.embedding, eps=1e-4, affine=False)

    def forward(self, student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
        """Return the batch's value for each example, `[N]`."""
        kept = self.ours.running_mean  # in whose precision a run keeps its numbers
        assert kept is not None
        ours = self.ours(self.project(student_embedding).to(kept.dtype))
        theirs = self.theirs(upcast(teacher_embedding.detach()).to(kept.dtype))
        differences = upcast(ours - theirs).abs().pow(self.power).sum()
        smallest = torch.finfo(differences.dtype).tiny
        return differences.clamp(min=smallest).log().expand(len(ours))


class StageHeads(nn.Module):
    r"""OFA-KD: each of the student's stages answers by itself, and learns the teacher's answer.

    `Σ_i Σ_k −((p_k + [k = y])^γ − [k = y]) log q_k^{(i)}`, p the teacher's and q the i-th head's
    probabilities at temperature 1. At γ = 1 it is the cross-entropy with the teacher; above, what
    the teacher gives the label weighs more. Only logits of the teacher are read, so models of any
    kinds can be paired, and a store of the teacher's answers serves.

    A head halves a map by separable convolutions as often as stages follow, then averages it and is
    linear. The authors' heads have two such convolutions for one of these, and attention blocks for
    transformers.

    Args:
        student: the student.
        teacher: the teacher.
        gamma: γ ≥ 1, the authors' `--ofa-eps`. They raise the teacher's own share of every class to
            it, and so does this; they have it on the final logits too, where `ofa` has plain KL.

    Raises:
        ValueError: for a γ below 1.

    Reference:
        Hao et al., One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
        Distillation, 2310.19444.
    """

    def __init__(self, student: ModelInfo, teacher: ModelInfo, gamma: float = 1.0) -> None:
        super().__init__()
        require(gamma >= 1, f"gamma must be at least 1, got {gamma}")
        self.gamma = float(gamma)
        width = max(student.embedding, teacher.embedding)
        last = len(student.channels) - 1
        self.heads = nn.ModuleList(
            nn.Sequential(
                *_halvings(channels, width, last - stage),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(width, student.classes),
            )
            for stage, channels in enumerate(student.channels)
        )

    def forward(self, student_maps: Sequence[Tensor], teacher: Tensor, target: Tensor) -> Tensor:
        """Return one value per example, `[N]`."""
        values = []
        for head, maps in zip(self.heads, student_maps, strict=True):
            student, z = logit_pair(head(maps), teacher)
            label = labels(student, target).unsqueeze(1)
            at_label = torch.zeros_like(z).scatter(1, label, 1.0)
            weight = (z.softmax(dim=1) + at_label).pow(self.gamma) - at_label
            values.append(-(weight * student.log_softmax(dim=1)).sum(dim=1))
        return torch.stack(values).sum(0)


def _halvings(channels: int, width: int, count: int) -> list[nn.Module]:
    """Return what halves a map so many times, doubling its channels, and ends at a width."""
    if not count:
        return [nn.Conv2d(channels, width, kernel_size=1)]
    widths = [channels * 2**step for step in range(count)] + [width]
    return [
        nn.Sequential(
            nn.Conv2d(one, one, 3, stride=2, padding=1, groups=one, bias=False),
            nn.Conv2d(one, two, kernel_size=1, bias=False),
            nn.BatchNorm2d(two),
            nn.ReLU(),
        )
        for one, two in pairwise(widths)
    ]


class Transport(nn.Module):
    r"""WKD-L: `wasserstein_kd`, with the costs between classes of the teacher's classifier.

    It has no weights; the costs are made once, of the teacher. γ stays as it is, where the authors
    let it fade to 0 as a cosine in the last 90 of 240 epochs.

    Args:
        student: the student.
        teacher: the teacher, whose classifier is one linear layer.
        gamma: weight of the transport.
        temperature: T > 0 of the other classes.
        regularization: η > 0, in units of the costs.
        iterations: how often both marginals are fitted.
        sharpness: κ > 0 of `class_costs`.

    Raises:
        ValueError: for another kind of classifier.

    Reference:
        Lv et al., Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
        Distillation, 2412.08139.
    """

    cost: Tensor

    def __init__(
        self,
        student: ModelInfo,
        teacher: ModelInfo,
        gamma: float = 800.0,
        temperature: float = 8.0,
        regularization: float = 0.05,
        iterations: int = 10,
        sharpness: float = 1.0,
    ) -> None:
        super().__init__()
        weight = upcast(linear_classifier(teacher, "teacher").weight)
        self.options: dict[str, Any] = {"gamma": gamma, "temperature": temperature}
        self.options |= {"regularization": regularization, "iterations": iterations}
        cost = class_costs(weight, sharpness)
        self.register_buffer("cost", cost, persistent=False)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Return one value per example, `[N]`."""
        return wasserstein_kd(student, teacher, target, self.cost, **self.options)


class ReusedClassifier(nn.Module):
    r"""SimKD: the student learns the teacher's embedding, and answers by the teacher's classifier.

    `mean_d (P·s − z)_d²` of embeddings s and z. The teacher's classifier of a projected embedding,
    `W·(P·s) + b`, is the linear layer `(W·P)·s + b` of the student's own: this is what its
    classifier is set to, so that the student is an ordinary model, which timm loads. The paper's
    projector is three convolutions, which no classifier of a timm model could take in.

    Args:
        student: the student, whose classifier is one linear layer.
        teacher: the teacher, whose classifier is one linear layer.

    Raises:
        ValueError: for another kind of classifier.

    Reference:
        Chen et al., Knowledge Distillation with the Reused Teacher Classifier, 2203.14001.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, student: ModelInfo, teacher: ModelInfo) -> None:
        super().__init__()
        linear_classifier(student, "student")
        layer = linear_classifier(teacher, "teacher")
        for name in ("weight", "bias"):
            value = upcast(getattr(layer, name).detach()).clone()  # a teacher may have fewer bits
            self.register_buffer(name, value, persistent=False)
        self.project = nn.Linear(student.embedding, teacher.embedding, bias=False)

    def forward(self, student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
        """Return one value per example, `[N]`."""
        theirs = upcast(teacher_embedding.detach())
        return (upcast(self.project(student_embedding)) - theirs).square().mean(dim=1)

    @torch.no_grad()
    def set_classifier(self, layer: nn.Linear) -> None:
        """Make a student's classifier that of the teacher after the projection."""
        layer.requires_grad_(False)  # nothing but this sets it
        layer.weight.copy_(self.weight @ self.project.weight)
        layer.bias.copy_(self.bias)
