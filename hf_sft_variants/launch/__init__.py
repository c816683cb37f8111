"""
From a recipe to a trainer: what `python -m hf_sft_variants.<method>` runs.

`trl sft` does not know the key `module`. It hands it to `accelerate launch`, which then starts that module in place of
TRL's script:

    trl sft --config recipe.yaml              # with `module: hf_sft_variants.poft`
    accelerate launch -m hf_sft_variants.poft --beta 0.5 .../trl/scripts/sft.py --config recipe.yaml
    python -m hf_sft_variants.poft --beta 0.5 .../trl/scripts/sft.py --config recipe.yaml

`poft/__main__.py` calls `main` in `training.py`, which trains step by step as TRL's script does. `parsing.py` reads
the arguments and the recipe. `recipe_checks.py` refuses mistakes in them, also a `module` other than the one that was
started. Commands that are given a recipe (`score`, `inspect`, `compare`) find its trainer by
`parsing.trainer_and_parser`.
"""
