"""The adapters: Ray Tune and MLflow. Nothing below this layer knows them."""
