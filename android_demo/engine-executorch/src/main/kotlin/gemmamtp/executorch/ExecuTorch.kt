package gemmamtp.executorch

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
import org.pytorch.executorch.DType
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import java.io.Closeable
import java.io.File
import java.nio.FloatBuffer
import java.nio.LongBuffer
import java.nio.ShortBuffer
import org.pytorch.executorch.Tensor as EtTensor

/**
 * Runs bundles of backend `executorch`.
 *
 * Its threads are one pool for the whole process, so all bundles that are open at once are opened with the same number.
 */
public class ExecuTorch : LoadGraphs {
    override fun load(bundle: File, manifest: Manifest, threads: Int): Map<String, BoundGraph> {
        requireBackend(bundle, manifest, "executorch", "ExecuTorch")
        val programs = HashMap<String, Program>()
        try {
            return openGraphs(manifest) { name, graph ->
                val program = programs.getOrPut(graph.file) { Program(File(bundle, graph.file), threads) }
                EtGraph(program, name, graph)
            }
        } catch (error: Throwable) { // memory may run out as well
            programs.values.forEach { it.close() }
            throw error
        }
    }
}

/** A method, whose cache inputs point into the app's memory in every call. */
private class EtGraph(private val program: Program, private val name: String, private val graph: Graph) : BoundGraph {
    private var cache = emptyMap<String, EValue>()

    init {
        program.load(name)
        program.graphs += this
    }

    override fun bind(cache: Map<String, Tensor>) {
        this.cache = graph.inputs.filter { it in cache }.associateWith { etValue(cache.getValue(it)) }
    }

    override fun run(inputs: Map<String, Tensor>): Map<String, Tensor> {
        try {
            val values = graph.inputs.map { cache[it] ?: etValue(inputs.getValue(it)) }
            val outputs = program.module.execute(name, *values.toTypedArray())
            // A program that was closed returns no outputs.
            check(outputs.size == graph.outputs.size) { "${outputs.size} outputs, not ${graph.outputs.size}" }
            return graph.outputs.indices.associate { graph.outputs[it] to output(outputs[it].toTensor()) }
        } catch (error: Exception) {
            throw InputError("${program.file}: cannot run (${firstLine(error)}); $REOPEN", error)
        }
    }

    override fun close() {
        program.graphs -= this
        cache = emptyMap()
        if (program.graphs.isEmpty()) program.close()
    }
}

/** A loaded .pte file, which is closed with the last of its graphs. */
private class Program(val file: File, threads: Int) : Closeable {
    val graphs = mutableSetOf<EtGraph>()
    val module: Module
    private var closed = false

    init {
        Pool.join(file, threads)
        try {
            module = Module.load(file.path, Module.LOAD_MODE_MMAP, threads)
        } catch (error: Throwable) { // memory may run out as well
            Pool.leave()
            throw when (error) {
                is LinkageError -> InputError("$file: ExecuTorch has no library for this processor (${firstLine(error)})", error)
                is Exception -> InputError("$file: ExecuTorch cannot load it (${firstLine(error)}); $RECHECK", error)
                else -> error
            }
        }
    }

    /** Load a method now: else ExecuTorch loads it in the first call, which is slow then. */
    fun load(method: String) {
        try {
            // Older versions return an error code, newer ones throw.
            val code: Any = module.loadMethod(method)
            check(code !is Int || code == 0) { "error $code" }
        } catch (error: Exception) {
            throw InputError("$file: ExecuTorch cannot load its method $method (${firstLine(error)}); $RECHECK", error)
        }
    }

    override fun close() {
        if (closed) return
        closed = true
        module.destroy()
        Pool.leave()
    }
}

/** ExecuTorch's thread pool, one a process. Loading a program may replace it, and others that point to it would crash. */
private object Pool {
    private var programs = 0
    private var threads = 0

    @Synchronized
    fun join(file: File, requested: Int) {
        if (programs > 0 && requested != threads) {
            throw InputError(
                "$file: asked for $requested threads while another bundle is loaded with $threads;" +
                    " ExecuTorch has one pool a process, so ask for the same number or close the other bundle first"
            )
        }
        threads = requested
        programs++
    }

    @Synchronized
    fun leave() {
        programs--
    }
}

/** A tensor over the same memory, not a copy. */
private fun etValue(tensor: Tensor): EValue =
    when (val data = tensor.data) {
        is FloatBuffer -> EValue.from(EtTensor.fromBlob(data, tensor.shape))
        is LongBuffer -> EValue.from(EtTensor.fromBlob(data, tensor.shape))
        is ShortBuffer -> EValue.from(EtTensor.fromBlob(data, tensor.shape)) // float16
        else -> throw IllegalArgumentException("an input is ${data.javaClass.simpleName}, not of floats, longs or shorts")
    }

/** A copy of an output, which lies in the method's own memory until its next call. */
private fun output(value: EtTensor): Tensor =
    when (val type = value.dtype()) {
        DType.FLOAT -> copied(FloatBuffer.wrap(value.dataAsFloatArray), value.shape())
        DType.INT64 -> copied(LongBuffer.wrap(value.dataAsLongArray), value.shape())
        else -> throw IllegalStateException("an output is $type, neither FLOAT nor INT64")
    }
