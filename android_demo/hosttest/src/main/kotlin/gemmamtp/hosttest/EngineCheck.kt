package gemmamtp.hosttest

import gemmamtp.core.BoundGraph
import gemmamtp.core.InputError
import gemmamtp.core.Manifest
import gemmamtp.core.Table
import gemmamtp.core.Tensor
import gemmamtp.core.floats
import gemmamtp.core.longs
import gemmamtp.core.maxRows
import gemmamtp.core.readManifest
import gemmamtp.demo.ENGINES
import java.io.ByteArrayOutputStream
import java.io.File
import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer
import kotlin.system.exitProcess

/** Runs the passes of test_engines.py, and collects every output and the cache after each pass. */
private class Check(private val manifest: Manifest, bundle: File, private val graphs: Map<String, BoundGraph>) {
    private val tables = manifest.tables.mapValues { Table(bundle, it.value) }
    private var cache = cacheOf(128)
    private val bytes = ByteArrayOutputStream()

    fun run(): ByteArray {
        bind()
        if (manifest.backend == "onnx") bindInVain()
        var outputs = target(0, (0 until 96).map(::token), listOf(95, 95))
        var state = row(outputs.getValue("state"), 0)
        var last = 7
        repeat(4) {
            val drafted = drafter(96, last, state)
            last = (drafted.getValue("draft_token").data as LongBuffer).get(0).toInt()
            state = drafted.getValue("next_state")
        }
        target(96, (0 until 6).map { token(it + 200) }, (0 until 6).toList())
        // Larger buffers, as when a text grows: the old buffers must not be used any more.
        val before = cache
        cache = cacheOf(256)
        for ((name, tensor) in cache) {
            val (heads, rows, dim) = tensor.shape.map { it.toInt() }
            val old = before.getValue(name).data as FloatBuffer
            for (head in 0 until heads) for (i in 0 until 128 * dim) {
                (tensor.data as FloatBuffer).put(head * rows * dim + i, old.get(head * 128 * dim + i))
            }
            repeat(old.capacity()) { old.put(it, 1e3f) }
        }
        bind()
        outputs = target(98, (0 until 4).map { token(it + 300) }, (0 until 4).toList())
        drafter(102, 9, row(outputs.getValue("state"), 3))
        return bytes.toByteArray()
    }

    /** A buffer of another size than its shape: what was bound before must stay so, and nothing be left open. */
    private fun bindInVain() {
        val name = manifest.kv.last().name
        val wrong = cache + (name to cache.getValue(name).let { Tensor(it.data, 1, 1) })
        try {
            graphs.getValue("target").bind(wrong)
        } catch (error: InputError) {
            check("cannot use the KV cache" in error.message!!) { "another error: ${error.message}" }
            return
        }
        throw IllegalStateException("a buffer of another size was bound")
    }

    private fun token(i: Int) = (i * 37 + 11) % manifest.vocabSize

    private fun cacheOf(most: Int) = manifest.kv.associate {
        val rows = minOf(most, maxRows(manifest, it))
        val shape = longArrayOf(it.numKeyValueHeads.toLong(), rows.toLong(), it.headDim.toLong())
        it.name to Tensor(floats(it.numKeyValueHeads * rows * it.headDim), *shape)
    }

    private fun bind() = graphs.values.forEach { it.bind(cache) }

    private fun target(position: Int, ids: List<Int>, rows: List<Int>) = pass(
        "target",
        mapOf(
            "embedded" to embeddingRows("embed_tokens", ids),
            "per_layer" to embeddingRows("embed_tokens_per_layer", ids),
            "position" to numbers(listOf(position)),
            "window_start" to numbers(listOf(0)),
            "output_rows" to numbers(rows),
        ),
    )

    private fun drafter(position: Int, token: Int, state: Tensor) = pass(
        "drafter",
        mapOf(
            "embedded" to embeddingRows("embed_tokens", listOf(token)),
            "state" to state,
            "position" to numbers(listOf(position)),
            "window_start" to numbers(listOf(0)),
        ),
    )

    private fun pass(name: String, inputs: Map<String, Tensor>): Map<String, Tensor> {
        val outputs = graphs.getValue(name).run(inputs)
        (outputs.values + cache.values).forEach(::keep)
        return outputs
    }

    private fun embeddingRows(name: String, ids: List<Int>): Tensor {
        val columns = manifest.tables.getValue(name).columns
        val data = floats(ids.size * columns).also { tables.getValue(name).read(ids, it) }
        return Tensor(data, ids.size.toLong(), columns.toLong())
    }

    private fun numbers(values: List<Int>): Tensor {
        val data = longs(values.size)
        values.forEachIndexed { i, value -> data.put(i, value.toLong()) }
        return Tensor(data, values.size.toLong())
    }

    private fun row(states: Tensor, index: Int): Tensor {
        val width = states.shape[1].toInt()
        val from = states.data as FloatBuffer
        val data = floats(width)
        repeat(width) { data.put(it, from.get(index * width + it)) }
        return Tensor(data, 1, width.toLong())
    }

    private fun keep(tensor: Tensor) {
        val data: Buffer = tensor.data
        val copy = ByteBuffer.allocate(data.capacity() * 8).order(ByteOrder.LITTLE_ENDIAN)
        if (data is FloatBuffer) repeat(data.capacity()) { copy.putFloat(data.get(it)) }
        if (data is LongBuffer) repeat(data.capacity()) { copy.putLong(data.get(it)) }
        bytes.write(copy.array(), 0, copy.position())
    }
}

/**
 * Arguments: the bundle, and the file to write, which `test_engines.py` compares. Exit status 2 and one line for an
 * [InputError].
 */
fun main(arguments: Array<String>) {
    val bundle = File(arguments[0])
    try {
        val manifest = readManifest(bundle)
        val graphs = ENGINES.load(bundle, manifest, 1)
        File(arguments[1]).writeBytes(Check(manifest, bundle, graphs).run())
        if (manifest.backend == "executorch") checkPool(bundle, manifest)
        // Twice: closing again must do nothing.
        repeat(2) { graphs.values.forEach { it.close() } }
        if (manifest.backend == "executorch") ENGINES.load(bundle, manifest, 2).values.forEach { it.close() }
        if (manifest.backend == "onnx") checkClosed()
    } catch (error: InputError) {
        System.err.println(error.message)
        exitProcess(2)
    }
}

/** No bundle may be loaded with another number of threads while one is loaded: the pool of the first would be freed. */
private fun checkPool(bundle: File, manifest: Manifest) {
    ENGINES.load(bundle, manifest, 1).values.forEach { it.close() }
    try {
        ENGINES.load(bundle, manifest, 2)
    } catch (error: InputError) {
        return
    }
    throw IllegalStateException("a second pool was made")
}

/** Check that all are closed. The stand-in counts them; the real classes, which this may be compiled against, do not. */
private fun checkClosed() {
    val open = Class.forName("ai.onnxruntime.Native").getMethod("open").invoke(null)
    check(open == 0) { "$open tensors, sessions or options were left open" }
}
