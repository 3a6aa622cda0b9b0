"""Networks: layers with a replicate axis, the VAEs and the discriminator.

They take plain numbers and know no configuration and no loss. Start with `networks.py`.
"""
