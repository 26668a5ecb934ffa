"""The hosts corrdit plugs into: diffusers and lightning."""
