"""Processes for tests to kill.

They are forked from a server that has neither threads nor progress bars: a copy of the test's own process would share
tqdm's lock with it, which nobody releases when its holder is killed.
"""

import multiprocessing


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["cdm_diffusers.training", "cdm_diffusers.evaluation", "test_training_loop"])
