"""Importing the package leaves the user's process as it was, but for the one registration that its README names."""

import json
import subprocess
import sys

# In a process of its own: here pytest and other tests have changed all of it. Libraries come first, so that what they
# do when they are imported is not counted; torch and transformers make loggers whenever one of their modules is read.
CHILD = """
import importlib, json, logging, os, pkgutil, signal, sys, warnings
import accelerate, babel, datasets, evaluate, matplotlib, pandas, peft, sacrebleu, scipy, sklearn, torch
import transformers.trainer_seq2seq
from transformers import CONFIG_MAPPING

try:
    import sentence_transformers
except ImportError:
    pass

def state():
    loggers = {name: it for name, it in logging.root.manager.loggerDict.items() if isinstance(it, logging.Logger)}
    loggers = {"root": logging.root} | loggers
    set_up = {n: (it.level, len(it.handlers), it.disabled, it.propagate, len(it.filters)) for n, it in loggers.items()}
    return {
        "filters": [repr(filter) for filter in warnings.filters],
        "environment": [f"{name}={value}" for name, value in os.environ.items()],
        "loggers": [f"{name} {it}" for name, it in set_up.items() if it != (0, 0, False, True, 0)],
        "model types": sorted(CONFIG_MAPPING.keys()),
        "torch": [torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()],
        "random": [torch.random.initial_seed()],
        "process": [signal.getsignal(signal.SIGINT), sys.excepthook, logging.root.manager.disable, *sys.path],
    }

before = state()
imported = []
for package in ("configuration_deepseek", "tokenization_deepseek", "modeling_deepseek", "finetune_deepseek"):
    path = importlib.import_module(package).__path__
    for module in pkgutil.walk_packages(path, package + "."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            if "pip install" not in str(error):  # else for an extra that isn't here
                raise
        imported.append(module.name)
after = state()
changed = {key: sorted(set(map(str, after[key])) ^ set(map(str, before[key]))) for key in before}
print(json.dumps([changed, imported]))
"""


def test_importing_registers_our_model_type_and_changes_nothing_else():
    run = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    changed, imported = json.loads(run.stdout)
    assert {name: found for name, found in changed.items() if found} == {"model types": ["deepseek"]}
    assert len(imported) > 80 and "finetune_deepseek.__main__" in imported


WITHOUT = "import sys; sys.modules['sentence_transformers'] = None; import finetune_deepseek.sentence_module"


def test_without_sentence_transformers_the_module_says_what_to_install():
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1] == (
        'ImportError: sentence-transformers is not installed: pip install "deepseek-hf[sentence-transformers]"'
    )
