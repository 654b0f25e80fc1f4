package gemmamtp.hosttest

import gemmamtp.core.LoadGraphs
import gemmamtp.executorch.ExecuTorch
import gemmamtp.onnx.OnnxRuntime

/** Bundles of either backend. An app has the engine of its bundle alone. */
val ENGINES = LoadGraphs { bundle, manifest, threads ->
    (if (manifest.backend == "onnx") OnnxRuntime() else ExecuTorch()).load(bundle, manifest, threads)
}
