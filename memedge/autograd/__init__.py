"""The checkpoint itself in torch, differentiated by autograd. Needs memedge[export]; nothing imports it unasked."""
