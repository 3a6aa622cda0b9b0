"""Networks: stacked layers, the VAEs and the discriminator. They take plain numbers and know no configuration."""
