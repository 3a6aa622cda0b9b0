"""The `modis-dist` commands: parse arguments, call one function of a lower layer, print.

One file per command or group of commands; `main.py` maps errors to exit codes. No logic lives here: computation belongs
to `planning`, `integrations`, `study` or `execution`. Start with `main.py`, then `tune.py`.
"""
