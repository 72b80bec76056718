"""Searches: Optuna proposes points, Hydra's launchers run them. The plug-in itself is bs_exp/plugins/hydra_plugins."""
