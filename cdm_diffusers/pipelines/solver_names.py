"""The samplers by name. Nothing is imported here, so that options can name them."""

from typing import Any, Literal


ANCESTRAL = "ancestral"  # this package's own schedulers

# What a name stands for: a scheduler of Diffusers, and the config entries it adds to the stage's. The samples of all
# of them are tested against a known Gaussian. Heun's method at few steps is an order of magnitude nearer to its limit
# with Karras's levels, since steps between evenly spaced ones multiply the network's error at the noisiest.
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsolver-singlestep": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "ipndm": ("IPNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "sde-dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
SOLVER_NAMES = (ANCESTRAL, *SOLVERS)
SolverName = Literal[SOLVER_NAMES]
