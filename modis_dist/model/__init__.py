"""Networks: layers with a slot axis, the VAEs and the discriminator.

Independent of the configuration and the losses. Start with `networks.py`.
"""
