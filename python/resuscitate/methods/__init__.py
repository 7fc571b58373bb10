"""The repair methods: what each measures at a layer, and the update that it solves for."""
