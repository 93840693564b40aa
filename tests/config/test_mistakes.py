"""Every mistake a person can make ends in one line and exit code 2, before anything is trained."""

import os
import pickle
import re
import shlex
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from distill import save_student
from tests.commands import COMMANDS, attempt
from tests.data.sources.shard_cases import write_shards

ARGS = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32], "stem_type": "deep", "stem_width": 4}
UNDER_HYDRA = ("distill", "distill-eval", "distill-store", "distill-export")
# What a run, an evaluation, an export or a prediction leaves when it is whole.
WHOLE = {"summary.json", "report.html", "student", "predictions.npz", "export.json", "views.png",
         "student.onnx", "found.csv", "reports.html"}  # fmt: skip
TIMM, IDX, FOLDER = "data=timm data.batch_size=4", "data=idx", "data=folder data.batch_size=4"
SHARDS = "data=shards data.batch_size=4"
CSV = "data=csv data.batch_size=4"
RESIDENT = f"{FOLDER} data.root=photos data.resident=true"
BUNDLE, GIVEN = "student.checkpoint=bundle", "teacher=timm teacher.checkpoint=bundle"
ALONE = "teacher=none"

# Command line → the key, value or file that its one line names; of a misspelt one, what is meant.
# `distill` is meant where no command is named.
MISTAKES = {
    # names
    "objective=kdd": "kd",
    "objective=zzz": "attention_transfer",
    "teacher=nope": "teacher=nope",
    "trainer=tpu": "gpu",
    "callbacks=[checkpoints,progres]": "progress",
    "experiment=fashion": "fashion_mnist",
    "sede=1": "seed",
    "zzz=1": "task_name",
    "objective.temprature=2": "objective.temperature=2",
    "trainer.max_epohcs=3": "trainer.max_epochs",
    "train.max_epoch=3": "trainer.max_epochs=3",
    "callbacks.bset.monitor=val/top1": "callbacks.best.monitor=val/top1",
    "objective.terms.cee.weight=2": "objective.terms.ce.weight=2",
    # what keys are called elsewhere
    "lr=0.1": "optimizer.lr=0.1",
    "learning_rte=0.1": "optimizer.lr=0.1",
    "epochs=3": "trainer.max_epochs=3",
    "max_epochs=3": "trainer.max_epochs=3",
    "batch_size=4": "data.batch_size=4",
    "img_size=48": "data.image_size=48",
    "workers=2": "data.num_workers=2",
    "temperature=2": "objective.temperature=2",
    "alpha=0.5": "objective.alpha=0.5",
    "model=resnet18": "student.name=resnet18",
    "dataset=folder": "data=folder",
    "precision=16-mixed": "trainer.precision=16-mixed",
    "devices=2": "trainer.devices=2",
    "momentum=0.9": "optimizer.momentum=0.9",
    "optimizer.learning_rate=1": "optimizer.lr",
    "teacher.lr=1": "teacher.fit.optimizer.lr=1",
    "checkpoint=x": "checkpoint=x",
    "root='my photos'": "data.root='my photos'",
    "data.root=photos": "data=folder",
    "annealing.end=2": "annealing=cosine",
    "distill-eval optimizer.lr=1": "optimizer.lr",
    # flags in the midst, dictionaries
    "objective=kdd --multirun seed=0": "kd",
    "'student.args={drop_rat: 1}'": "drop_rat",
    "student.args={drop_rat: 1}": "drop_rat",
    "'optimizer={opt: sgd}'": "optimizer.lr=",
    # what a shell or Hydra's grammar takes apart
    "data.root=größe": 'data.root=\'"größe"\'',
    "data.root='a (1)'": 'data.root=\'"a (1)"\'',
    "data.root=~/x": 'data.root=\'"~/x"\'',
    "data.root=a=b": 'data.root=\'"a=b"\'',
    "data.root=a,b": 'data.root=\'"a,b"\'',
    "teacher.checkpoints=[größe/a,b]": 'teacher.checkpoints=\'["größe/a",b]\'',
    "objective.terms.ce.loss=nope": "nope",
    "objective.terms.ce.loss=os.system": "os.system",
    "objective.terms.ce.loss=nope.nope": "nope.nope",
    "optimizer.opt=adamm": "adamm",
    "+optimizer.lrr=1": "lrr",
    "scheduler.sched=cosin": "cosin",
    "scheduler.sched=plateau": "plateau",
    "student=timm student.name=resnet81": "student.name",
    "teacher.name=resnet81": "teacher.name",
    "optimized_metric=val/top11": "optimized_metric=val/top11",
    "sweep.metrics=[val/top1,val/ecce]": "sweep.metrics",
    "callbacks.best.monitor=val/nope": "callbacks.best.monitor=val/nope",
    "annealing=cosine annealing.value=temprature": "temprature",
    "callbacks.best._target_=os.system": "callbacks.best",
    "objective._target_=distill.objectives.Objective":
        "distill.objective.objective.Objective",
    "+callbacks.mine._target_=distill.callbacks.annealing.Annealing":
        "callbacks.mine._target_=distill.callbacks.annealing.Annealing",
    "data.view.foo=1": "data.view",
    "+data.view.foo=1": "data.view",
    "distill-eval objective=kd": "objective",
    # what cannot be read
    "optimizer.lr=[": "optimizer.lr",
    "objective": "objective",
    "--nope": "--nope",
    "--config-dir nowhere": "nowhere",
    "objective.temperature='${nope}'": "nope",
    "distill-predict bundle": "IMAGE",
    "distill-predict bundle photos --topk x": "--topk",
    "distill-predict bundle photos --format xml": "--format",
    "distill-push bundle": "OWNER/NAME",
    "distill-report": "RUN_OR_SWEEP",
    "distill-report bundle --output x.html": "--output",
    # kinds of values
    "objective.temperature=0": "objective.temperature",
    "objective.temperature=-1": "objective.temperature",
    "objective.temperature=nan": "objective.temperature",
    "objective.temperature=inf": "objective.temperature",
    "objective.temperature=warm": "objective.temperature",
    "objective.temperature=true": "objective.temperature",
    "objective.alpha=1.5": "objective.alpha",
    "objective.alpha=x": "objective.alpha",
    "objective.terms.kl.weight=-1": "objective.terms.kl.weight",
    "objective.terms.ce=3": "objective.terms.ce",
    "objective=hint objective.stages=[]": "objective.stages",
    "seed=x": "seed",
    "seed=-1": "seed",
    "topk=3": "topk",
    "topk=[x]": "topk",
    "baseline=x": "baseline",
    "ckpt_path=3": "ckpt_path",
    "data.batch_size=0": "data.batch_size",
    "data.batch_size=-1": "data.batch_size",
    "data.batch_size=1.5": "data.batch_size",
    "data.val_fraction=0": "data.val_fraction",
    "data.view.pad=x": "data.view.pad",
    "optimizer.lr=0": "optimizer.lr",
    "optimizer.lr=nan": "optimizer.lr",
    "optimizer.weight_decay=-1": "optimizer.weight_decay",
    "optimizer=3": "optimizer",
    "scheduler.warmup_epochs=9": "scheduler.warmup_epochs=9",
    "trainer.max_epochs=0": "trainer.max_epochs",
    "trainer.max_epochs=x": "trainer.max_epochs",
    "trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_val=-1": "trainer.gradient_clip_val",
    "trainer.limit_train_batches=0": "trainer.limit_train_batches",
    "trainer.precision=12": "12",
    "trainer.accelerator=foo": "accelerator",
    "trainer.devices=x": "trainer.devices",
    "trainer.compile=foo": "trainer.compile",
    "student.args=3": "student.args",
    "+student.args.stem_width=x": "slim_resnet10_4",
    "teacher.fit.max_epochs=0": "teacher.fit.max_epochs",
    "teacher.precision=int4": "teacher.precision",
    "teacher.batch_size=0": "teacher.batch_size",
    "teacher.device=0": "teacher.device",
    "teacher.device=cuda:99": "teacher.device=cuda:99",
    "trainer=ddp trainer.devices=2 teacher.device=cuda:1": "all 2 processes",
    "teacher.fit.optimizer.opt=nope": "teacher.fit.optimizer",
    "annealing=cosine annealing.end=0": "annealing.end=0",
    "annealing=cosine annealing.warmup=nan": "annealing.warmup",
    "annealing=cosine annealing.value=alpha annealing.end=2": "objective.alpha",
    "callbacks=ema callbacks.ema.decay=2": "callbacks.ema.decay",
    "callbacks=sparsity callbacks.sparsity.strength=-1": "sparsity.strength",
    "store.dtype=float8": "store.dtype",
    "store.mode=foo": "store.mode",
    "store=disk store.topk=10": "store.topk=10",
    "store=disk store.max_gb=0": "store.max_gb=0",
    "decision.confidence=2": "decision.confidence",
    "shot_groups=[100,20]": "shot_groups",
    "assistants=3": "assistants",
    "'assistants=[{foo: 1}]'": "student",
    "preview.enabled=foo": "preview.enabled",
    "views=preview": "views",
    "objective.keep.small_loss=0.6":
        "objective.sample_selection.small_loss=0.6",
    "preview.enabled=true preview.row=-1": "preview.row",
    "preview.enabled=true preview.row=9999": "9999",
    "distill-store store.views=0": "store.views",
    "store.topk=few": "store.topk",
    "distill-store store.part=1": "store.parts=N",
    "distill-store store.parts=2": "store.part,",
    "distill-store store.part=2 store.parts=2": "store.part=2",
    f"distill-eval {BUNDLE} corruptions=[nope]": "corruptions",
    f"distill-eval {BUNDLE} corruptions=3": "corruptions",
    f"distill-eval {BUNDLE} topk=[10]": "top-10",
    f"distill-export {BUNDLE} export.formats=[tflite]": "onnx_int8",
    f"distill-export {BUNDLE} export.formats=[]": "onnx",
    f"distill-export {BUNDLE} export.weights=foo": "per_channel",
    f"distill-export {BUNDLE} export.max_drop=-1": "export.max_drop",
    f"distill-export {BUNDLE} export.study=x": "export.study",
    f"distill-export {BUNDLE} export.calibration_images=0": "export.calibration_images",
    "distill-predict bundle photos --topk 11": "--topk",
    "distill-predict bundle photos --batch-size 0": "--batch-size",
    "distill-predict bundle photos --device foo": "--device",
    # data
    "data=folder": "data.root=…",
    f"{FOLDER} data.root=nowhere": "nowhere",
    f"{FOLDER} data.root=text.txt": "text.txt",
    f"{FOLDER} data.root=empty": "empty",
    f"{FOLDER} data.root=2024": "data.root",
    f"{FOLDER} data.root=single": "single",
    f"{FOLDER} data.root=two": "two",
    f"{FOLDER} data.root=hollow": "hollow/train/c",
    f"{FOLDER} data.root=unlike": "b, c",
    f"{FOLDER} data.root=zero": "zero/train/a/0.png",
    f"{FOLDER} data.root=cut": "cut/train/a/0.png",
    f"{FOLDER} data.root=float": "float/train/a/0.tiff",
    f"{FOLDER} data.root=bomb": "bomb/train/a/0.ppm",
    f"{FOLDER} data.root=photos data.channels=2": "data.channels",
    f"{FOLDER} data.root=photos data.broken=no": "data.broken",
    f"{FOLDER} data.root=photos data.duplicates=no": "data.duplicates",
    f"{FOLDER} data.root=photos/train": "data.root",
    f"{CSV} data.root=photos": "data.file",
    f"{CSV} data.root=photos data.file=x.csv": "data.file=x.csv",
    f"{CSV} data.root=photos data.file=text.txt": "text.txt",
    f"{FOLDER} data.root=photos data.view.scale=[0,0]": "data.view.scale",
    f"{FOLDER} data.root=photos data.view.hflip=2": "data.view.hflip",
    "data.view.hue=0.1": "data.view.hue",
    f"{IDX} data.root=empty": "train-images-idx3-ubyte",
    f"{IDX} data.root=labels data.classes=[a,b]": "7",
    f"{IDX} data.root=cutidx": "train-images-idx3-ubyte",
    f"{FOLDER} data.root=photos data.resident=yes": "data.resident",
    f"{RESIDENT} data.view.crop_pct=0.9": "data.view.crop_pct=0.9",
    f"{RESIDENT} data.view.flip=false": "data.view.hflip=null",
    f"{RESIDENT} data.image_size=1000000": "data.resident=false",
    "data=cifar10": "data.root=…",
    "data=cifar10 data.root=nowhere": "data.download=true",
    f"{FOLDER} data.root=photos data.decoder=opencv": "data.decoder",
    "data=cifar10 data.root=photos": "cifar-10-batches-py",
    "data=cifar10 data.root=empty data.download=perhaps": "data.download",
    "data=cifar100 data.root=empty data.labels=rough": "data.labels",
    "data=cifar100 data.root=pickled": "cifar-100-python/meta: it would run",
    "data=cifar100 data.root=partial": "cifar-100-python lacks test",
    "data=arrays data.root=nowhere.npz": "nowhere.npz",
    "data=arrays data.root=text.txt": "text.txt",
    "data=arrays data.root=empty": "x_train",
    "data=arrays data.root=floats.npz": "float64",
    "data=arrays data.root=objects.npz": "y_train",
    f"{TIMM} data.root=nowhere": "data.root=nowhere",
    f"{TIMM} data.root=text.txt": "text.txt",
    f"{TIMM} data.name=nope/x": "hfds/",
    f"{TIMM} data.name=tfds/x": "distill-kd[data]",
    f"{TIMM} data.root=photos/train data.classes=[x]": "1 class",
    "data=shards": "data.root=…",
    f"{SHARDS} data.root=nowhere": "nowhere",
    f"{SHARDS} data.root=photos": "data=folder reads its images",
    f"{SHARDS} data.root=2024": "data.root",
    f"{SHARDS} data.root=[]": "data.root",
    f"{FOLDER} data.root=[photos]": "data.root",
    f"{SHARDS} data.root=tars/train-{{0..1}}.tar": "data.root='\"tars/train-{0..1}.tar\"'",
    f"{SHARDS} data.root=tars/train-0000.tar data.root=tars/train-0001.tar": "2 times",
    f"{SHARDS} data.root='\"tars/train-{{0000..0009}}.tar\"'": "7 shards are missing",
    f"{SHARDS} data.root=s3://bucket/train-000.tar": "s3fs",
    f"{SHARDS} data.root=cuttars": "cuttars/train-0001.tar",
    f"{SHARDS} data.root=tars data.verify=x": "data.verify",
    f"{SHARDS} data.root=tars data.broken=no": "data.broken",
    f"{SHARDS} data.root=tars data.retries=-1": "data.retries",
    f"{SHARDS} data.root=tars data.cache_gb=0": "data.cache_gb",
    f"{SHARDS} data.root=tars data.shuffle_window=0": "data.shuffle_window",
    f"{SHARDS} data.root=tars data.label_key=[x]": "data.label_key",
    f"{SHARDS} data.root=tars data.label_key=x": "no label",
    f"{SHARDS} data.root=tars data.classes=[x]": "1 classes are named",
    "data.timeout=-1": "data.timeout",
    "data.timeout=soon": "data.timeout",
    # conditions
    "condition.noise=nope": "condition.noise=nope",
    "condition.noise=text.txt": "text.txt",
    "condition.noise=negative.csv": "row of 0",
    "condition.rate=0.4": "condition.rate=0.4",
    "condition=symmetric_noise condition.rate=1": "condition.rate",
    "condition=long_tail condition.imbalance=0": "condition.imbalance",
    "condition=few_shot condition.shots=1000": "89 training images of 0",
    "condition.drop=[x]": "condition.drop",
    # files: costs, checkpoints, bundles
    "decision.costs=nowhere": "decision.costs=nowhere",
    "decision.costs=empty": "decision.costs=empty",
    "decision.costs=zero.csv": "zero.csv",
    "decision.costs=latin.csv": "latin.csv",
    "decision.costs=ragged.csv": "ragged.csv",
    "ckpt_path=nowhere.ckpt": "ckpt_path=nowhere.ckpt",
    "ckpt_path=empty": "ckpt_path=empty",
    "ckpt_path=text.txt": "text.txt",
    "ckpt_path=other.ckpt": "ckpt_path=other.ckpt",
    "student.checkpoint=nowhere": "nowhere",
    "teacher=timm teacher.checkpoint=nowhere": "nowhere",
    "teacher=timm teacher.checkpoint=three": "three has 3 classes",
    f"{GIVEN} teacher.image_size=0": "teacher.image_size",
    f"{GIVEN} teacher.classes=nowhere.csv": "teacher.classes=nowhere.csv",
    f"{GIVEN} teacher.classes=text.txt": "text.txt",
    "teacher=ensemble": "teacher.checkpoints",
    "teacher=ensemble teacher.checkpoints=bundle": "teacher.checkpoints",
    "teacher=ensemble teacher.checkpoints=[bundle] teacher.weights=[1,2]": "teacher.weights",
    "teacher=ensemble teacher.checkpoints=[bundle] teacher.combine=foo": "teacher.combine",
    "distill-eval": "student.checkpoint",
    "distill-eval student.checkpoint=text.txt": "text.txt",
    "distill-eval student.checkpoint=zero.csv": "zero.csv",
    "distill-eval student.checkpoint=pickle.ckpt": "pickle.ckpt",
    "distill-eval student.checkpoint=three": "0, 1, 2",
    "distill-eval student.checkpoint=cutweights": "cutweights",
    f"distill-eval {BUNDLE} baseline=three": "three has 3 classes",
    f"distill-eval {BUNDLE} trainer.accelerator=foo": "accelerator",
    "distill-export": "student.checkpoint",
    "distill-export student.checkpoint=cutweights": "cutweights",
    "distill-export student.checkpoint=badfacts": "badfacts/distill.json",
    "distill-predict text.txt photos": "text.txt",
    "distill-predict badfacts photos": "badfacts/distill.json",
    "distill-predict bundle nowhere": "nowhere",
    "distill-predict bundle empty": "empty",
    "distill-push bundle owl": "OWNER/NAME",
    "distill-push bundle a/b": "hf auth login",
    "distill-report nowhere": "nowhere",
    "distill-report text.txt": "text.txt",
    "distill-report empty": "empty",
    "distill-report run": "summary.json",
    "distill-report nested": "nested/summary.json",
    "distill-report evil": "overrides.yaml",
    "distill-report run empty --output photos": "--output",
    # places that cannot be written
    "hydra.run.dir=text.txt": "text.txt",
    "hydra.run.dir=/proc/nothing": "/proc/nothing",
    "paths.cache=text.txt": "paths.cache=text.txt",
    "store=disk store.path=text.txt": "store.path=text.txt",
    f"distill-store {GIVEN} store.path=/proc/x": "store.path=/proc/x",
    "distill-predict bundle photos --output photos": "--output",
    "distill-predict bundle photos --output /proc/x.csv": "/proc/x.csv",
    # what is not installed
    "logger=wandb": "distill-kd[wandb]",
    "logger=mlflow": "distill-kd[mlflow]",
    # what does not go together
    ALONE: "objective=supervised",
    f"distill-store {ALONE}": "teacher",
    "student=timm": "student.name",
    "student.args.num_classes=3": "args.num_classes",
    "+student.args.num_classes=3": "args.num_classes",
    "topk=[1,10]": "top-10",
    "optimized_metric=val/top5 topk=[1]": "optimized_metric=val/top5",
    "objective=dist data.batch_size=1": "data.batch_size=1",
    f"objective=smooth_topk {ALONE} objective.terms.topk.k=10": "k must",
    f"objective=gce {ALONE} objective.terms.gce.q=0": "q must",
    f"objective=gce {ALONE} objective.terms.gce.q=x": "objective.terms.gce.q",
    f"objective=gce {ALONE} annealing=cosine": "temperature",
    "objective=dkd objective.terms.dkd.beta=-3": "beta",
    "objective=ctkd annealing=cosine": "temperature",
    "objective=ctkd objective.curriculum.high=3": "curriculum.high",
    "objective=hint objective.stages=[9]": "5 stages",
    "objective=dkd data.view.mixup=1": "class indices",
    "objective=hint store=disk": "store=off",
    "objective=crd objective.terms.contrast.width=-3": "width",
    "objective=reviewkd +objective.terms.review.width=0": "width",
    "objective=deit": "student.name=deit_tiny_distilled_patch16_224",
    "objective=simkd callbacks=[checkpoints,progress,ema]": "callbacks.ema",
    "objective=simkd +objective.terms.ce.loss=cross_entropy": "classifier",
    "pair=r32x4_r8x4 teacher=none objective=supervised": "student.name=",
    "+objective.terms.ce.scal=1": "scal",
    "objective=ldam teacher=none objective.label_smoothing=0.1": "terms.ldam",
    "objective.label_smoothing=1": "label_smoothing",
    "objective.label_smoothing=null": "None",
    "objective.sample_selection.small_loss=0": "small_loss",
    "objective.sample_selection.agreement=2": "sample_selection.agreement",
    "objective.sample_selection.agreement=true data.view.mixup=1": "class indices",
    "objective=dkd objective.alpha=1": "objective.terms.dkd",
    "data.balance=2": "data.balance",
    "data.views_per_step=3": "data.views_per_step must be a whole number of at least 1, at most 2",
    "objective=mlkd_two_views data.strong_view.pd=3": "data.strong_view has no option pd",
    "objective=mlkd_two_views data.strong_view.saturation=1": "data.strong_view.saturation",
    "objective=mlkd_two_views data.view.mixup=1": "data.view mixes two samples",
    "objective=mlkd_two_views data.strong_view.cutmix=1": "data.strong_view mixes two samples",
    "objective=mlkd_two_views store=disk": "store=off",
    "distill-store objective=mlkd_two_views": "store=off",
    "data.strong_view=3": "data.strong_view must be keys with values",
    "+objective.sample_selection.small_los=0.6": "small_loss",
    "objective.sample_selection.small_loss=0.6 annealing=linear annealing.end=0.9 "
    "annealing.value=sample_selection.small_loss": "sample_selection.small_loss",
    "trainer.strategy=ddp_fork": "use ddp",
    "trainer.strategy=fsdp": "use ddp",
    "trainer.max_steps=0": "trainer.max_steps",
    "callbacks=[ema,sparsity]": "sparsity or ema",
    "callbacks=fake_quantize trainer.compile=true": "trainer.compile",
}  # fmt: skip
# Command line → what its one line says, where no name alone could say it.
TEXTS = {
    f"{FOLDER} data.root=photos objective=dkd": "with two classes there is only one",
    "'condition=[few_shot,long_tail]'": "both say how many images are kept",
    "condition.drop=[0,1,2,3,4,5,6,7,8]": "leaves fewer than two classes",
    "teacher.classes=zero.csv": "is for a teacher that has weights: this one is to be trained",
    f"{GIVEN} teacher.image_size=[32]": "or a list of height and width",
    f"distill-eval {BUNDLE} teacher=trained": "would have random weights",
    "distill-predict bundle -": "no image was named",
    f"{ALONE} objective.temperature=auto": "asks the teacher, and there is none",
    f"{ALONE} objective=supervised store=disk": "there is no teacher",
    f"{ALONE} objective=supervised 'assistants=[{{args: {{}}}}]'": "learn from a teacher",
    "teacher=timm teacher.name=resnet18": "would have random weights",
    "teacher=timm teacher.name=resnet18 teacher.pretrained=true": "has 1000 classes",
    "student=timm student.name=inception_v3": "does not take 1×32×32 images",
    "data=folder data.root=photos data.batch_size=4 +data.view.crop_mode=border student=timm "
    "student.name=mobilevit_xxs": r"pad in the colour \[124, 116, 104\], .* in \[0, 0, 0\]",
    f"objective=gce {ALONE} objective.temperature=4": "no term of this objective takes one",
    f"objective=gce {ALONE} objective.sample_selection.agreement=true": "give one",
    "annealing=exponential annealing.value=terms.kl.weight annealing.end=0": "positive",
    "trainer.check_val_every_n_epoch=20": "never validates",
    "teacher=ensemble teacher.checkpoints=[bundle] teacher.combine=draw store=disk": "no lasting",
    "-m seed=0 trainer.strategy=ddp trainer.devices=2": "would repeat the sweep in every process",
    "-m hydra.launcher.devices=x seed=0,1": "give auto, a number or a list of GPUs",
    f"distill-export -m {BUNDLE}": "takes one student at a time: leave out -m",
}  # fmt: skip
INSTALLED = ("objective=kdd", "objective.temprature=2", "optimizer.lr=[", "--nope", "sede=1",
             "hydra.run.dir=text.txt", "distill-eval objective=kd", "distill-predict bundle",
             "distill-push bundle", "distill-report", "distill-report bundle --output x.html",
             "experiment=fashion", "callbacks=[checkpoints,progres]", "--config-dir nowhere",
             "objective.temperature=0")  # fmt: skip


def write_bundle(path, classes=10, channels=1):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=classes, in_chans=channels, **ARGS)
    half = [0.5] * channels
    return save_student(model, path, classes=[str(k) for k in range(classes)], mean=half, std=half,
                        input_size=(channels, 32, 32), facts={"temperature": 2.0})  # fmt: skip


def write_photos(folder, count=12, classes=("a", "b"), part="train"):
    for name in classes:
        (folder / part / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (9 * i, 0, 0)).save(folder / part / name / f"{i}.png")
    return folder / part / classes[0] / "0.png"


def write_idx(folder, labels, images):
    folder.mkdir()
    shape = [len(images).to_bytes(4, "big"), *[(8).to_bytes(4, "big")] * 2]
    for part in ("train", "t10k"):
        content = b"\0\0\x08\x03" + b"".join(shape) + images.tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(content)
        content = b"\0\0\x08\x01" + shape[0] + bytes(labels)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(content)


class Pickled:
    def __reduce__(self):
        return os.mkdir, ("run-by-a-pickle",)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of everything that can be wrong."""
    world = tmp_path_factory.mktemp("world")
    for name, options in (("bundle", {}), ("three", {"classes": 3})):
        write_bundle(world / name, **options)
    for name in ("cutweights", "badfacts"):
        shutil.copytree(world / "bundle", world / name)
    weights = world / "cutweights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (world / "badfacts" / "distill.json").write_text("{")
    write_photos(world / "photos")
    for name in ("tars", "cuttars"):
        write_shards(world / name)
    cut = world / "cuttars" / "train-0001.tar"
    cut.write_bytes(cut.read_bytes()[:2000])
    (world / "empty").mkdir()
    (world / "text.txt").write_text("x")
    (world / "zero.csv").write_bytes(b"")
    (world / "latin.csv").write_bytes("é,1\n".encode("latin-1"))
    (world / "ragged.csv").write_text("\n".join(["0,1,2,3,4,5,6,7,8,9"] * 9 + ["1,2"]))
    (world / "negative.csv").write_text("\n".join([",".join(["-1"] * 10)] * 10))
    write_photos(world / "single", classes=("a",))
    write_photos(world / "two", count=2)
    write_photos(world / "hollow")
    (world / "hollow" / "train" / "c").mkdir()
    write_photos(world / "unlike")
    write_photos(world / "unlike", classes=("a", "c"), part="test")
    write_photos(world / "zero").write_bytes(b"")
    first = write_photos(world / "cut")
    first.write_bytes(first.read_bytes()[:40])
    first = write_photos(world / "float")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(first.with_suffix(".tiff"))
    first = write_photos(world / "bomb")
    first.with_suffix(".ppm").write_bytes(b"P6 40000 40000 255 ")
    images = np.zeros((40, 8, 8), np.uint8)
    write_idx(world / "labels", [0, 1] * 19 + [0, 7], images)
    write_idx(world / "cutidx", [0, 1] * 20, images)
    file = world / "cutidx" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    np.savez(world / "floats.npz", x_train=images / 255, y_train=np.arange(40))
    np.savez(world / "objects.npz", x_train=images, y_train=np.array([Pickled()]))
    for name, files in (("pickled", ("train", "test", "meta")), ("partial", ("train", "meta"))):
        (world / name / "cifar-100-python").mkdir(parents=True)
        for file in files:
            (world / name / "cifar-100-python" / file).write_bytes(pickle.dumps(Pickled()))
    torch.save({"state_dict": {"student.x": torch.ones(1)}}, world / "other.ckpt")
    torch.save({"state_dict": {"student.x": Pickled()}}, world / "pickle.ckpt")
    for name, content in (("run", "{}"), ("nested", "[" * 10**5)):
        (world / name).mkdir()
        (world / name / "summary.json").write_text(content)
    (world / "evil" / "0" / ".hydra").mkdir(parents=True)
    target = "!!python/object/apply:os.mkdir [run-by-yaml]\n"
    (world / "evil" / "0" / ".hydra" / "overrides.yaml").write_text(target)
    return world


def contents(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def command_line(line, folder):
    """Return a case as a command that writes into a folder."""
    arguments = shlex.split(line)
    if arguments[:1] == [] or arguments[0] not in COMMANDS:
        arguments = ["distill", *arguments]
    if arguments[0] in UNDER_HYDRA and "hydra.run.dir" not in line:
        arguments.append(f"hydra.{'sweep' if '-m' in arguments else 'run'}.dir={folder}")
    return arguments


def check(mistake, code, errors, arguments, folder):
    assert code == 2, errors
    (line,) = errors.splitlines()
    assert line.startswith(f"{arguments[0]}: ") or line.startswith("distill: ")
    assert MISTAKES.get(mistake, "") in line
    assert re.search(TEXTS.get(mistake, ""), line), line
    assert len(line) < 1000
    assert not {path.name for path in folder.rglob("*")} & WHOLE


# The jobs of a sweep leave their logs to be closed by whoever collects them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("line", [*MISTAKES, *TEXTS])
def test_a_mistake_ends_in_one_line_before_anything_is_trained(line, world, tmp_path):
    arguments, before = command_line(line, tmp_path / "out"), contents(world)
    caches = {"DISTILL_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}
    ended = attempt(arguments, world, **caches)
    check(line, ended.code, ended.errors, arguments, tmp_path)
    assert contents(world) == before


@pytest.mark.parametrize("line", INSTALLED)
def test_the_installed_command_says_the_same(line, world, tmp_path, command):
    arguments = command_line(line, tmp_path / "out")
    done = command(*arguments, folder=world, check=False)
    check(line, done.returncode, done.stderr, arguments, tmp_path)


def test_files_whose_names_are_not_utf8_are_answered_and_named(world, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copyfile(world / "photos" / "train" / "a" / "0.png", tmp_path / name)
    arguments = ["distill-predict", str(world / "bundle"), str(tmp_path), "--output", "found.csv"]
    assert attempt(arguments, tmp_path).code == 0
    assert b"caf\xe9.png" in (tmp_path / "found.csv").read_bytes()
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "found.csv").unlink()
    ended = attempt(arguments, tmp_path)
    assert ended.code == 2
    assert "none of 1 images could be read" in ended.errors
    assert not (tmp_path / "found.csv").exists()
