"""Every mistake a person can make ends in one line and exit code 2, before anything is trained."""

import os
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

ARGS = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32], "stem_type": "deep", "stem_width": 4}
UNDER_HYDRA = ("distill", "distill-eval", "distill-store", "distill-export")
# What a run, an evaluation, an export or a prediction leaves when it is whole.
WHOLE = {"summary.json", "report.html", "student", "predictions.npz", "export.json", "views.png",
         "student.onnx", "found.csv", "reports.html"}  # fmt: skip
TIMM, IDX, FOLDER = "data=timm data.batch_size=4", "data=idx", "data=folder data.batch_size=4"
CSV = "data=csv data.batch_size=4"
BUNDLE, GIVEN = "student.checkpoint=bundle", "teacher=timm teacher.checkpoint=bundle"
ALONE = "teacher=none"

# Command line → what its one line says. `distill` is meant where no command is named.
MISTAKES = {
    # names
    "objective=kdd": "there is no objective=kdd; did you mean kd?",
    "objective=zzz": "there are attention_transfer, class_balanced",
    "teacher=nope": "there is no teacher=nope",
    "trainer=tpu": "there is no trainer=tpu; did you mean gpu?",
    "callbacks=[checkpoints,progres]": "there is no callbacks=progres; did you mean progress?",
    "experiment=fashion": "did you mean fashion_mnist?",
    "sede=1": "did you mean seed?",
    "zzz=1": "there are hydra, task_name",
    "objective.temprature=2": r"did you mean objective.temperature=2\?",
    "trainer.max_epohcs=3": r"has no option max_epohcs; did you mean trainer.max_epochs\?",
    "train.max_epoch=3": r"did you mean trainer.max_epochs=3\?",
    "callbacks.bset.monitor=val/top1": r"did you mean callbacks.best.monitor=val/top1\?",
    "objective.terms.cee.weight=2": r"did you mean objective.terms.ce.weight=2\?",
    # what keys are called elsewhere
    "lr=0.1": r"'lr'; did you mean optimizer.lr=0.1\?",
    "learning_rte=0.1": r"did you mean optimizer.lr=0.1\?",
    "epochs=3": r"did you mean trainer.max_epochs=3\?",
    "max_epochs=3": r"did you mean trainer.max_epochs=3\?",
    "batch_size=4": r"did you mean data.batch_size=4\?",
    "img_size=48": r"did you mean data.image_size=48\?",
    "workers=2": r"did you mean data.num_workers=2\?",
    "temperature=2": r"did you mean objective.temperature=2\?",
    "alpha=0.5": r"did you mean objective.alpha=0.5\?",
    "model=resnet18": r"did you mean student.name=resnet18\?",
    "dataset=folder": r"did you mean data=folder\?",
    "precision=16-mixed": r"did you mean trainer.precision=16-mixed\?",
    "devices=2": r"did you mean trainer.devices=2\?",
    "momentum=0.9": r"did you mean optimizer.momentum=0.9\?",
    "optimizer.learning_rate=1": r"'learning_rate'; did you mean optimizer.lr\?",
    "teacher.lr=1": r"did you mean teacher.fit.optimizer.lr=1\?",
    "checkpoint=x": r"teacher.checkpoint=x or student.checkpoint=x\?|student.checkpoint=x",
    "root='my photos'": r"did you mean data.root='my photos'\? \(with data=.*data=folder",
    "data.root=photos": "'data.root': it goes with .*data=folder",
    "annealing.end=2": "it goes with annealing=cosine or",
    "distill-eval optimizer.lr=1": "Could not override 'optimizer.lr'; there are hydra",
    # flags in the midst, dictionaries
    "objective=kdd --multirun seed=0": "there is no objective=kdd; did you mean kd?",
    "'student.args={drop_rat: 1}'": "'drop_rat'",
    "student.args={drop_rat: 1}": "'drop_rat'",
    "'optimizer={opt: sgd}'": "optimizer has no learning rate: give optimizer.lr=",
    # what a shell or Hydra's grammar takes apart
    "data.root=größe": """cannot read .*: it needs quotes within quotes: data.root='"größe"'""",
    "data.root='a (1)'": """data.root='"a \\(1\\)"'""",
    "data.root=~/x": """data.root='"~/x"'""",
    "data.root=a=b": """data.root='"a=b"'""",
    "data.root=a,b": """are several values: add -m .*: data.root='"a,b"'""",
    "teacher.checkpoints=[größe/a,b]": """teacher.checkpoints='\\["größe/a",b\\]'""",
    "objective.terms.ce.loss=nope": "unknown loss 'nope'; there are",
    "objective.terms.ce.loss=os.system": "os.system must take student",
    "objective.terms.ce.loss=nope.nope": "cannot import the loss 'nope.nope'",
    "optimizer.opt=adamm": "optimizer .* Optimizer adamm not found",
    "+optimizer.lrr=1": "optimizer .*lrr",
    "scheduler.sched=cosin": "Unknown scheduler 'cosin'",
    "scheduler.sched=plateau": "plateau follows a metric",
    "student=timm student.name=resnet81": "student.name; did you mean resnet",
    "teacher.name=resnet81": "teacher.name; did you mean resnet",
    "optimized_metric=val/top11": "optimized_metric=val/top11 is not logged; there are val/top1",
    "sweep.metrics=[val/top1,val/ecce]": "sweep.metrics=val/ecce is not logged",
    "callbacks.best.monitor=val/nope": "callbacks.best.monitor=val/nope is not logged",
    "annealing=cosine annealing.value=temprature": "cannot anneal 'temprature'",
    "callbacks.best._target_=os.system": "callbacks.best: Target 'os.system' is blocklisted",
    "objective._target_=distill.objectives.Objective":
        "distill.objectives.Objective is distill.objective.objective.Objective now",
    "+callbacks.mine._target_=distill.callbacks.annealing.Annealing":
        "callbacks.mine._target_=distill.callbacks.annealing.Annealing is distill.training.",
    "data.view.foo=1": "data.view has no option foo",
    "+data.view.foo=1": "data.view has no option foo",
    "distill-eval objective=kd": "Could not override 'objective'",
    # what cannot be read
    "optimizer.lr=[": r"cannot read 'optimizer.lr=\['",
    "objective": "cannot read 'objective'",
    "--nope": "unrecognized arguments: --nope",
    "--config-dir nowhere": "nowhere' not found",
    "objective.temperature='${nope}'": "Interpolation key 'nope' not found",
    "distill-predict bundle": "arguments are required: IMAGE",
    "distill-predict bundle photos --topk x": "--topk: invalid int value: 'x'",
    "distill-predict bundle photos --format xml": "--format: invalid choice: 'xml'",
    "distill-push bundle": "arguments are required: OWNER/NAME",
    "distill-report": "arguments are required: RUN_OR_SWEEP",
    "distill-report bundle --output x.html": "--output is for several runs or sweeps",
    # kinds of values
    "objective.temperature=0": "objective.temperature must be a number above 0, got 0",
    "objective.temperature=-1": "objective.temperature must be a number above 0",
    "objective.temperature=nan": "objective.temperature must be .* got nan",
    "objective.temperature=inf": "objective.temperature must be .* got inf",
    "objective.temperature=warm": "objective.temperature must be .* got 'warm'",
    "objective.temperature=true": "objective.temperature must be .* got True",
    "objective.alpha=1.5": "objective.alpha must lie in",
    "objective.alpha=x": "objective.alpha must lie in .* got 'x'",
    "objective.terms.kl.weight=-1": "objective.terms.kl.weight must be at least 0",
    "objective.terms.ce=3": "objective.terms.ce must be a loss or a mapping",
    "objective=hint objective.stages=[]": "objective.stages names no stage",
    "seed=x": "seed must be a whole number",
    "seed=-1": "seed must be a whole number of at least 0",
    "topk=3": "topk must be a list",
    "topk=[x]": "topk must be a list",
    "baseline=x": "baseline must be true or false",
    "ckpt_path=3": r"ckpt_path must be a path \(one that is a number begins with ./\)",
    "data.batch_size=0": "data.batch_size must be a whole number of at least 1, got 0",
    "data.batch_size=-1": "data.batch_size must be",
    "data.batch_size=1.5": "data.batch_size must be",
    "data.val_fraction=0": "data.val_fraction must lie between 0 and 1",
    "data.view.pad=x": "data.view.pad must be whole pixels",
    "optimizer.lr=0": "optimizer.lr must be a number above 0",
    "optimizer.lr=nan": "optimizer.lr must be",
    "optimizer.weight_decay=-1": "optimizer.weight_decay must be a number of at least 0",
    "optimizer=3": "optimizer must be keys with values",
    "scheduler.warmup_epochs=9": "scheduler.warmup_epochs=9 leaves none of 8 epochs",
    "trainer.max_epochs=0": "trainer.max_epochs must be a whole number of at least 1",
    "trainer.max_epochs=x": "trainer.max_epochs must be",
    "trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches must be",
    "trainer.gradient_clip_val=-1": "trainer.gradient_clip_val must be",
    "trainer.limit_train_batches=0": "trainer.limit_train_batches must be a share",
    "trainer.precision=12": "Precision 12 is invalid",
    "trainer.accelerator=foo": "invalid accelerator name",
    "trainer.devices=x": "trainer.devices must be",
    "trainer.compile=foo": "trainer.compile must be",
    "student.args=3": "student.args must be keys with values",
    "+student.args.stem_width=x": "timm cannot build slim_resnet10_4",
    "teacher.fit.max_epochs=0": "teacher.fit.max_epochs must be",
    "teacher.fit.optimizer.opt=nope": "teacher.fit.optimizer .*Optimizer nope not found",
    "annealing=cosine annealing.end=0": "annealing.end=0: objective.temperature must be",
    "annealing=cosine annealing.warmup=nan": "annealing.warmup must be at least 0",
    "annealing=cosine annealing.value=alpha annealing.end=2": "objective.alpha must lie in",
    "callbacks=ema callbacks.ema.decay=2": "callbacks.ema.decay must be a number from 0 to 1",
    "callbacks=sparsity callbacks.sparsity.strength=-1": "sparsity.strength must be",
    "store.dtype=float8": "store.dtype must be float16 or float32",
    "store.mode=foo": "store.mode must be auto or disk",
    "store=disk store.topk=10": "store.topk=10 must lie between 1 and 9",
    "store=disk store.max_gb=0": "are more than store.max_gb=0",
    "decision.confidence=2": "decision.confidence must be a number from 0 to 1",
    "shot_groups=[100,20]": "shot_groups must be two numbers",
    "assistants=3": "assistants must be a list",
    "'assistants=[{foo: 1}]'": "is not a change of `student`",
    "preview.enabled=foo": "preview.enabled must be true or false",
    "views=preview": "views is preview.enabled now, give preview.enabled=true",
    "objective.keep.small_loss=0.6":
        "objective.keep is objective.sample_selection now, give objective.sample_selection.small_l",
    "preview.enabled=true preview.row=-1": "preview.row must be a whole number",
    "preview.enabled=true preview.row=9999": "there is no training image 9999",
    "distill-store store.views=0": "store.views must be a whole number of at least 1",
    f"distill-eval {BUNDLE} corruptions=[nope]": "corruptions: there is no nope; there are",
    f"distill-eval {BUNDLE} corruptions=3": "corruptions must be true, false or a list",
    f"distill-eval {BUNDLE} topk=[10]": "top-10 says nothing among 10 classes",
    f"distill-export {BUNDLE} export.formats=[tflite]": "tflite is none of onnx, onnx_int8",
    f"distill-export {BUNDLE} export.formats=[]": "is none of onnx",
    f"distill-export {BUNDLE} export.weights=foo": "is none of per_channel, per_tensor",
    f"distill-export {BUNDLE} export.max_drop=-1": "export.max_drop must be",
    f"distill-export {BUNDLE} export.study=x": "export.study must be true or false",
    f"distill-export {BUNDLE} export.calibration_images=0": "export.calibration_images must be",
    "distill-predict bundle photos --topk 11": "--topk 11 is not from 1 to the student's 10",
    "distill-predict bundle photos --batch-size 0": "--batch-size 0: give a number of at least 1",
    "distill-predict bundle photos --device foo": "--device foo",
    # data
    "data=folder": "give data.root=…",
    f"{FOLDER} data.root=nowhere": "nowhere is not a folder: it does not exist",
    f"{FOLDER} data.root=text.txt": "text.txt is not a folder",
    f"{FOLDER} data.root=empty": "empty has no folder 'train'",
    f"{FOLDER} data.root=2024": "data.root must be a path",
    f"{FOLDER} data.root=single": "single has 1 class: nothing to tell apart",
    f"{FOLDER} data.root=two": "two: train has 2 images of a, and 3 are needed",
    f"{FOLDER} data.root=hollow": "hollow/train/c has no images",
    f"{FOLDER} data.root=unlike": "train and test have different classes: b, c",
    f"{FOLDER} data.root=zero": "broken image zero/train/a/0.png: it is not an image",
    f"{FOLDER} data.root=cut": "broken image cut/train/a/0.png: it is not an image",
    f"{FOLDER} data.root=float": "broken image float/train/a/0.tiff: floating-point pixels",
    f"{FOLDER} data.root=bomb": "broken image bomb/train/a/0.ppm: .*decompression bomb",
    f"{FOLDER} data.root=photos data.channels=2": "data.channels must be 1",
    f"{FOLDER} data.root=photos data.broken=no": "data.broken must be refuse or skip, got 'no'",
    f"{FOLDER} data.root=photos data.duplicates=no": "data.duplicates must be keep or drop",
    f"{FOLDER} data.root=photos/train": "no folder 'train': did you mean data.root",
    f"{CSV} data.root=photos": "give data.file=…",
    f"{CSV} data.root=photos data.file=x.csv": "data.file=x.csv is neither in photos nor",
    f"{CSV} data.root=photos data.file=text.txt": "text.txt has one column",
    f"{FOLDER} data.root=photos data.view.scale=[0,0]": "data.view.scale must be two numbers",
    f"{FOLDER} data.root=photos data.view.hflip=2": "data.view.hflip must be a probability",
    f"{FOLDER} data.root=photos objective=dkd": "with two classes there is only one",
    "data.view.hue=0.1": "data.view.hue needs colours",
    f"{IDX} data.root=empty": "empty has no train-images-idx3-ubyte",
    f"{IDX} data.root=labels data.classes=[a,b]": "labels go up to 7, but 2 classes are named",
    f"{IDX} data.root=cutidx": "train-images-idx3-ubyte",
    f"{TIMM} data.root=nowhere": "data.root=nowhere does not exist",
    f"{TIMM} data.root=text.txt": "timm cannot open text.txt",
    f"{TIMM} data.name=nope/x": "should begin with hfds/",
    f"{TIMM} data.name=tfds/x": r"it needs pip install 'distill-kd\[data\]'",
    f"{TIMM} data.root=photos/train data.classes=[x]": "1 class",
    # conditions
    "condition.noise=nope": "condition.noise=nope is neither symmetric nor pair",
    "condition.noise=text.txt": "text.txt line 1 is one cell",
    "condition.noise=negative.csv": "the row of 0 must hold shares or counts",
    "condition.rate=0.4": "condition.rate=0.4 goes with condition.noise=symmetric or pair",
    "condition=symmetric_noise condition.rate=1": "condition.rate must be a share",
    "condition=long_tail condition.imbalance=0": "condition.imbalance must be at least 1",
    "condition=few_shot condition.shots=1000": "there are 89 training images of 0",
    "'condition=[few_shot,long_tail]'": "both say how many images are kept",
    "condition.drop=[x]": "condition.drop: there is no class x",
    "condition.drop=[0,1,2,3,4,5,6,7,8]": "leaves fewer than two classes",
    # files: costs, checkpoints, bundles
    "decision.costs=nowhere": "decision.costs=nowhere: No such file",
    "decision.costs=empty": "decision.costs=empty: Is a directory",
    "decision.costs=zero.csv": "zero.csv is empty",
    "decision.costs=latin.csv": "latin.csv is not UTF-8 text",
    "decision.costs=ragged.csv": "ragged.csv",
    "ckpt_path=nowhere.ckpt": "ckpt_path=nowhere.ckpt does not exist",
    "ckpt_path=empty": "ckpt_path=empty does not exist",
    "ckpt_path=text.txt": "text.txt is not a checkpoint that can be read safely",
    "ckpt_path=other.ckpt": "ckpt_path=other.ckpt is a checkpoint of another student",
    "student.checkpoint=nowhere": "no checkpoint at nowhere",
    "teacher=timm teacher.checkpoint=nowhere": "no checkpoint at nowhere",
    "teacher=timm teacher.checkpoint=three": "three has 3 classes and the data have 10",
    "teacher.classes=zero.csv": "is for a teacher that has weights: this one is to be trained",
    f"{GIVEN} teacher.image_size=0": "teacher.image_size must be a number of pixels",
    f"{GIVEN} teacher.image_size=[32]": "or a list of height and width",
    f"{GIVEN} teacher.classes=nowhere.csv": "teacher.classes=nowhere.csv: No such file",
    f"{GIVEN} teacher.classes=text.txt": "text.txt has no line for '0', '1'",
    "teacher=ensemble": "an ensemble needs teacher.checkpoints",
    "teacher=ensemble teacher.checkpoints=bundle": "teacher.checkpoints must be a list",
    "teacher=ensemble teacher.checkpoints=[bundle] teacher.weights=[1,2]": "teacher.weights must",
    "teacher=ensemble teacher.checkpoints=[bundle] teacher.combine=foo": "teacher.combine must",
    "distill-eval": "give student.checkpoint=PATH",
    "distill-eval student.checkpoint=text.txt": "text.txt is not a weights file",
    "distill-eval student.checkpoint=zero.csv": "zero.csv is not a weights file",
    "distill-eval student.checkpoint=pickle.ckpt": "pickle.ckpt is not a checkpoint",
    "distill-eval student.checkpoint=three": "three knows the classes 0, 1, 2 .* give the data",
    "distill-eval student.checkpoint=cutweights": "is not a weights file that can be read safely",
    f"distill-eval {BUNDLE} baseline=three": "three has 3 classes and the data have 10",
    f"distill-eval {BUNDLE} teacher=trained": "would have random weights",
    f"distill-eval {BUNDLE} trainer.accelerator=foo": "invalid accelerator name",
    "distill-export": "give student.checkpoint=PATH",
    "distill-export student.checkpoint=cutweights": "cannot|not a weights file",
    "distill-export student.checkpoint=badfacts": "badfacts/distill.json is damaged",
    "distill-predict text.txt photos": "text.txt is not a weights file that can be read safely",
    "distill-predict badfacts photos": "badfacts/distill.json is damaged",
    "distill-predict bundle nowhere": "there is no nowhere",
    "distill-predict bundle empty": "there are no images in empty",
    "distill-predict bundle -": "no image was named",
    "distill-push bundle owl": "owl is not OWNER/NAME",
    "distill-push bundle a/b": "there is no token: run `hf auth login`",
    "distill-report nowhere": "nowhere holds neither a finished run nor a sweep",
    "distill-report text.txt": "text.txt holds neither",
    "distill-report empty": "empty holds neither",
    "distill-report run": "summary.json .*is not what this version writes",
    "distill-report nested": "nested/summary.json is damaged",
    "distill-report evil": "overrides.yaml is damaged",
    "distill-report run empty --output photos": "--output photos is a folder",
    # places that cannot be written
    "hydra.run.dir=text.txt": "text.txt",
    "hydra.run.dir=/proc/nothing": "/proc/nothing",
    "paths.cache=text.txt": "paths.cache=text.txt cannot be made",
    "store=disk store.path=text.txt": "store.path=text.txt cannot be made",
    f"distill-store {GIVEN} store.path=/proc/x": "store.path=/proc/x cannot be made",
    "distill-predict bundle photos --output photos": "--output photos is a folder",
    "distill-predict bundle photos --output /proc/x.csv": "/proc/x.csv",
    # what is not installed
    "logger=wandb": r"pip install 'distill-kd\[wandb\]'",
    "logger=mlflow": r"pip install 'distill-kd\[mlflow\]'",
    # what does not go together
    ALONE: "this objective compares with a teacher: give one, or objective=supervised",
    f"{ALONE} objective.temperature=auto": "asks the teacher, and there is none",
    f"{ALONE} objective=supervised store=disk": "there is no teacher",
    f"{ALONE} objective=supervised 'assistants=[{{args: {{}}}}]'": "learn from a teacher",
    f"distill-store {ALONE}": "there is no teacher whose answers could be kept",
    "teacher=timm teacher.name=resnet18": "would have random weights",
    "teacher=timm teacher.name=resnet18 teacher.pretrained=true": "has 1000 classes",
    "student=timm": "give student.name",
    "student=timm student.name=inception_v3": "does not take 1×32×32 images",
    "data=folder data.root=photos data.batch_size=4 +data.view.crop_mode=border student=timm "
    "student.name=mobilevit_xxs": r"pad in the colour \[124, 116, 104\], .* in \[0, 0, 0\]",
    "student.args.num_classes=3": "args.num_classes=3: the data decide it, and have 10",
    "+student.args.num_classes=3": "args.num_classes=3: the data decide it, and have 10",
    "topk=[1,10]": "top-10 says nothing among 10 classes",
    "optimized_metric=val/top5 topk=[1]": "optimized_metric=val/top5 is not logged",
    "objective=dist data.batch_size=1": "no columns at data.batch_size=1",
    f"objective=smooth_topk {ALONE} objective.terms.topk.k=10": "k must be a whole number from 1",
    f"objective=gce {ALONE} objective.terms.gce.q=0": r"q must be in \(0, 1\]",
    f"objective=gce {ALONE} objective.terms.gce.q=x": "objective.terms.gce.q must be a number",
    f"objective=gce {ALONE} objective.temperature=4": "no term of this objective takes one",
    f"objective=gce {ALONE} annealing=cosine": "cannot anneal 'temperature'",
    "objective=dkd objective.terms.dkd.beta=-3": "beta must be finite and ≥ 0",
    "objective=ctkd annealing=cosine": "cannot anneal 'temperature'",
    "objective=ctkd objective.curriculum.high=3": "curriculum.high",
    "objective=hint objective.stages=[9]": "the student has 5 stages",
    "objective=hint store=disk": "feature maps are not kept",
    "objective=dkd data.view.mixup=1": "this loss needs class indices",
    "+objective.terms.ce.scal=1": "has no option 'scal'",
    "objective=ldam teacher=none objective.label_smoothing=0.1": "terms.ldam cannot be smoothed",
    "objective.label_smoothing=1": "label_smoothing must lie in",
    "objective.label_smoothing=null": r"must lie in \[0, 1\), got None",
    "objective.sample_selection.small_loss=0": "small_loss is the share",
    "objective.sample_selection.agreement=2": "sample_selection.agreement is true",
    f"objective=gce {ALONE} objective.sample_selection.agreement=true": "give one",
    "objective.sample_selection.agreement=true data.view.mixup=1": "needs class indices",
    "objective=dkd objective.alpha=1": "objective.terms.dkd reads them",
    "data.balance=2": "data.balance is the power",
    "+objective.sample_selection.small_los=0.6":
        "sample_selection has no option 'small_los'; it takes small_loss",
    "objective.sample_selection.small_loss=0.6 annealing=linear annealing.end=0.9 "
    "annealing.value=sample_selection.small_loss": "both move sample_selection.small_loss",
    "annealing=exponential annealing.value=terms.kl.weight annealing.end=0": "positive",
    "trainer.check_val_every_n_epoch=20": "never validates",
    "trainer.strategy=ddp_fork": "leaves the results in another process: use ddp",
    "trainer.strategy=fsdp": "leave each device a piece of the student: use ddp",
    "+trainer.max_steps=3": "trainer.max_steps is the run's own to set",
    "callbacks=[ema,sparsity]": "leave out sparsity or ema",
    "callbacks=fake_quantize trainer.compile=true": "needs trainer.compile=false",
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


def check(code, errors, arguments, message, folder):
    assert code == 2, errors
    (line,) = errors.splitlines()
    assert line.startswith(f"{arguments[0]}: ") or line.startswith("distill: ")
    assert re.search(message, line), line
    assert len(line) < 1000
    assert not {path.name for path in folder.rglob("*")} & WHOLE


# The jobs of a sweep leave their logs to be closed by whoever collects them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_ends_in_one_line_before_anything_is_trained(line, world, tmp_path):
    arguments, before = command_line(line, tmp_path / "out"), contents(world)
    caches = {"DISTILL_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}
    ended = attempt(arguments, world, **caches)
    check(ended.code, ended.errors, arguments, MISTAKES[line], tmp_path)
    assert contents(world) == before


@pytest.mark.parametrize("line", INSTALLED)
def test_the_installed_command_says_the_same(line, world, tmp_path, command):
    arguments = command_line(line, tmp_path / "out")
    done = command(*arguments, folder=world, check=False)
    check(done.returncode, done.stderr, arguments, MISTAKES[line], tmp_path)


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
