"""Recipes to begin with, one YAML file each: `deepseek-hf finetune TASK --config` takes one."""
