"""Runtime of var_deploy: loads a bundle and turns class ids into images."""
