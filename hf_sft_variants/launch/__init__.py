"""From a recipe to a trainer: what `python -m hf_sft_variants.<method>` runs."""
