"""`tgate-fx bench`: tgate_fx, diffusers and their peers on one model, taking turns on one machine."""
