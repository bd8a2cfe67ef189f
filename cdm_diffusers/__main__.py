"""`python -m cdm_diffusers ...` is `cdm ...`; so is `accelerate launch -m cdm_diffusers ...`, on many GPUs."""

from .commands.main import main


if __name__ == "__main__":
    main()
