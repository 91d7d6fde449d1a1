"""Making pictures with Anima by diffusers: finding and loading the model, one request, its record in the PNG."""
