"""ONNX Runtime's CUDA graphs, on the processor: sessions that record and replay as its source says it does there."""

import threading


class GraphSession:
    """A session of provider "cpu" that obeys `gpu_graph_id` as one of provider "cuda" with `enable_cuda_graph`.

    A graph belongs to a thread and an id; recording it takes two plain runs; a replay looks at nothing that is bound
    then, but reads and writes where the recorded run did.
    """

    def __init__(self, session):
        self._session = session
        self._graphs = {}
        self.bound = []  # (name, shape, address) of each binding ever made
        self.log = []  # (what was done, thread)
        self.refusal = None  # what recording raises
        self.stale = False  # whether replays do nothing
        self.run_options = []

    def get_inputs(self):
        return self._session.get_inputs()

    def get_outputs(self):
        return self._session.get_outputs()

    def io_binding(self):
        return _Binding(self._session.io_binding(), self.bound)

    def run_with_iobinding(self, binding, options):
        self.run_options.append(options.get_run_config_entry("disable_synchronize_execution_providers"))
        graph, thread = int(options.get_run_config_entry("gpu_graph_id")), threading.get_ident()
        assert graph != 0, "it is ONNX Runtime's own"
        if graph == -1:
            self.log.append(("plain", thread))
            self._session.run_with_iobinding(binding.own)
        elif (thread, graph) in self._graphs:
            self.log.append(("replay", thread))
            if not self.stale:
                self._session.run_with_iobinding(self._graphs[thread, graph])
        else:
            if self.refusal:
                raise self.refusal
            self.log.append(("record", thread))
            for _ in range(3):
                self._session.run_with_iobinding(binding.own)
            self._graphs[thread, graph] = binding.own


class _Binding:
    def __init__(self, own, bound):
        self.own, self._bound = own, bound

    def bind_input(self, name, device, index, dtype, shape, pointer):
        self._bound.append((name, tuple(shape), pointer))
        self.own.bind_input(name, device, index, dtype, shape, pointer)

    def bind_output(self, name, device, index, dtype, shape, pointer):
        self._bound.append((name, tuple(shape), pointer))
        self.own.bind_output(name, device, index, dtype, shape, pointer)
