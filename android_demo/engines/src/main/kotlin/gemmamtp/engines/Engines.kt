package gemmamtp.engines

import gemmamtp.core.BoundGraph
import gemmamtp.core.Graph
import gemmamtp.core.InputError
import gemmamtp.core.LoadGraphs
import gemmamtp.core.Manifest
import gemmamtp.core.Tensor
import gemmamtp.core.floats
import gemmamtp.core.longs
import java.io.Closeable
import java.io.File
import java.nio.Buffer
import java.nio.FloatBuffer
import java.nio.LongBuffer

/** The runtimes that this app has, by the name of the backend in a bundle's manifest. */
object Engines : LoadGraphs {
    private val loaders = mapOf("onnx" to ::loadOrt, "executorch" to ::loadEt)

    override fun load(bundle: File, manifest: Manifest, threads: Int?): Map<String, BoundGraph> {
        val load = loaders[manifest.backend] ?: throw InputError(
            "$bundle: made for backend '${manifest.backend}', expected ${loaders.keys.joinToString(" or ")}; export it for one of these"
        )
        return load(bundle, manifest, threads)
    }
}

/** What helps where a runtime fails in a pass, whose reason is rarely the bundle: memory runs out, or the runtime is at fault. */
internal const val REOPEN = "close other apps, and open the bundle again"

/** What helps where a runtime cannot load a file. */
internal const val RECHECK =
    "check its files (`verify`), and copy it again if one has changed, else export it for this version or free some memory"

/** Open every graph of a manifest, one after the other; if one fails, close those before it. */
internal fun <T : Closeable> openGraphs(manifest: Manifest, open: (String, Graph) -> T): Map<String, T> {
    val opened = LinkedHashMap<String, T>()
    try {
        for ((name, graph) in manifest.graphs) opened[name] = open(name, graph)
    } catch (error: Throwable) { // memory may run out as well
        opened.values.forEach { it.close() }
        throw error
    }
    return opened
}

/** The first line of a runtime's error message; some runtimes append a whole log. */
internal fun line(error: Throwable): String =
    error.message?.lineSequence()?.firstOrNull { it.isNotBlank() } ?: error.javaClass.simpleName

/** A copy in direct memory, because outputs of one call may be inputs of the next. */
internal fun copied(values: FloatBuffer, shape: LongArray) =
    Tensor(floats(values.remaining()).also { whole(it.put(values)) }, *shape)

internal fun copied(values: LongBuffer, shape: LongArray) =
    Tensor(longs(values.remaining()).also { whole(it.put(values)) }, *shape)

/** Make all of a buffer its content. On [Buffer]: FloatBuffer's own `clear` is missing on older phones. */
internal fun whole(buffer: Buffer): Buffer = buffer.clear()
