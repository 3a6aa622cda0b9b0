"""Ray: a private one, one that is given, trainings and packs on them."""
