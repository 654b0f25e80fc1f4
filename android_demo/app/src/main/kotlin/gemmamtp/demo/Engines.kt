package gemmamtp.demo

import gemmamtp.core.LoadGraphs
import gemmamtp.executorch.ExecuTorch
import gemmamtp.onnx.OnnxRuntime

/** Both, so that any bundle can be tried. An app of one bundle has the engine of its backend alone. */
val ENGINES = LoadGraphs { bundle, manifest, threads ->
    (if (manifest.backend == "onnx") OnnxRuntime() else ExecuTorch()).load(bundle, manifest, threads)
}
