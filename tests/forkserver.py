"""Processes for tests to kill.

They are forked from a server that has neither threads nor progress bars: a copy of the test's own process would share
tqdm's lock with it, which nobody releases when its holder is killed.
"""

import multiprocessing


# Heavy modules, imported once by the server for all of its processes.
PRELOADED = ["cdm_diffusers.training.loop", "cdm_diffusers.evaluation.classifier", "cdm_diffusers.evaluation.sample"]
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([*PRELOADED, "test_training_loop"])
