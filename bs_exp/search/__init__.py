"""Searches with Optuna. The plug-in that gives them to Hydra is bs_exp/cli/plugins/hydra_plugins/bs_exp_optuna.py."""
