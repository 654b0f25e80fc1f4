package gemmamtp.onnx

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
import gemmamtp.core.BoundGraph
import gemmamtp.core.Graph
import gemmamtp.core.InputError
import gemmamtp.core.LoadGraphs
import gemmamtp.core.Manifest
import gemmamtp.core.RECHECK
import gemmamtp.core.REOPEN
import gemmamtp.core.Tensor
import gemmamtp.core.copied
import gemmamtp.core.firstLine
import gemmamtp.core.openGraphs
import gemmamtp.core.requireBackend
import gemmamtp.core.requireRuntime
import gemmamtp.core.whole
import java.io.File
import java.nio.FloatBuffer
import java.nio.LongBuffer
import java.nio.ShortBuffer

/**
 * Runs bundles of backend `onnx`.
 *
 * @param spinning whether threads that wait for work keep their cores busy: a few percent more tokens a second, for more
 *     power and heat, and less for whatever else the phone does.
 */
public class OnnxRuntime @JvmOverloads constructor(private val spinning: Boolean = false) : LoadGraphs {
    override fun load(bundle: File, manifest: Manifest, threads: Int): Map<String, BoundGraph> {
        requireBackend(bundle, manifest, "onnx", "ONNX Runtime")
        requireRuntime(bundle, manifest, "ONNX Runtime", version(bundle))
        return openGraphs(manifest) { _, graph -> OrtGraph(File(bundle, graph.file), graph, threads, spinning) }
    }
}

private fun version(bundle: File): String =
    try {
        OrtEnvironment.getEnvironment().version
    } catch (error: LinkageError) {
        throw InputError("$bundle: ONNX Runtime has no library for this processor (${firstLine(error)})", error)
    }

/** A session whose cache inputs and outputs are bound to the same memory, so that it writes in place. */
private class OrtGraph(private val file: File, private val graph: Graph, threads: Int, spinning: Boolean) : BoundGraph {
    private val options: OrtSession.SessionOptions
    private val session: OrtSession
    private var cache = emptyMap<String, OnnxTensor>()
    private var pinned = emptyMap<String, OnnxTensor>()
    private var requested = graph.outputs.toSet()
    private var closed = false

    init {
        try {
            options = OrtSession.SessionOptions()
            session = try {
                options.setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR)
                options.setIntraOpNumThreads(threads)
                options.addConfigEntry("session.intra_op.allow_spinning", if (spinning) "1" else "0")
                OrtEnvironment.getEnvironment().createSession(file.path, options)
            } catch (error: Throwable) { // memory may run out as well
                options.close()
                throw error
            }
        } catch (error: Exception) {
            val version = OrtEnvironment.getEnvironment().version
            throw InputError("$file: ONNX Runtime $version cannot load it (${firstLine(error)}); $RECHECK", error)
        } catch (error: LinkageError) {
            throw InputError("$file: ONNX Runtime has no library for this processor (${firstLine(error)})", error)
        }
    }

    /** Make one tensor for each buffer, which is an input and, if the graph updates it, also an output. */
    override fun bind(cache: Map<String, Tensor>) {
        val old = this.cache
        val bound = HashMap<String, OnnxTensor>()
        try {
            for (name in graph.inputs.filter { it in cache }) bound[name] = onnxTensor(cache.getValue(name))
        } catch (error: Throwable) { // memory may run out as well
            bound.values.forEach { it.close() }
            throw if (error is OrtException) InputError("$file: cannot use the KV cache (${firstLine(error)}); $REOPEN", error) else error
        }
        this.cache = bound
        pinned = graph.outputs.filter { bufferOf(it) in this.cache }.associateWith { this.cache.getValue(bufferOf(it)) }
        requested = graph.outputs.toSet() - pinned.keys
        old.values.forEach { it.close() }
    }

    override fun run(inputs: Map<String, Tensor>): Map<String, Tensor> {
        val inputTensors = HashMap<String, OnnxTensor>()
        try {
            for ((name, tensor) in inputs) inputTensors[name] = onnxTensor(tensor)
            session.run(cache + inputTensors, requested, pinned).use { result ->
                return result.filter { it.key in requested }.associate { it.key to output(it.value as OnnxTensor) }
            }
        } catch (error: Exception) {
            throw InputError("$file: cannot run (${firstLine(error)}); $REOPEN", error)
        } finally {
            inputTensors.values.forEach { it.close() }
        }
    }

    override fun close() {
        if (closed) return
        closed = true
        cache.values.forEach { it.close() }
        session.close()
        options.close() // not before: sessions may use what options hold
    }
}

/** Name of the buffer that an output updates. */
private fun bufferOf(output: String) = output.removeSuffix("_out")

/** A tensor over all of the same memory, whatever the buffer's position: ONNX Runtime takes what remains after it. */
private fun onnxTensor(tensor: Tensor): OnnxTensor {
    val environment = OrtEnvironment.getEnvironment()
    return when (val data = tensor.data) {
        is FloatBuffer -> OnnxTensor.createTensor(environment, data.duplicate().also { whole(it) }, tensor.shape)
        is LongBuffer -> OnnxTensor.createTensor(environment, data.duplicate().also { whole(it) }, tensor.shape)
        is ShortBuffer -> {
            val bits = data.duplicate().also { whole(it) }
            OnnxTensor.createTensor(environment, bits, tensor.shape, OnnxJavaType.FLOAT16)
        }
        else -> throw IllegalArgumentException("an input is ${data.javaClass.simpleName}, not of floats, longs or shorts")
    }
}

/** A copy of an output in direct memory: ONNX Runtime returns copies on the heap. */
private fun output(value: OnnxTensor): Tensor {
    // Not as properties: TensorInfo also has a field `shape`, which is not public.
    val shape = value.getInfo().getShape()
    value.getFloatBuffer()?.let { return copied(it, shape) }
    value.getLongBuffer()?.let { return copied(it, shape) }
    throw IllegalStateException("an output is neither of floats nor of longs")
}
