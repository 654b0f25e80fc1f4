package gemmamtp.core

import java.nio.Buffer
import java.nio.ByteBuffer

/** Numbers of the cache, as [Tensor.data] holds them: float16 as the bits of shorts. */
enum class KVType(val bytes: Int) {
    FLOAT32(Float.SIZE_BYTES),
    FLOAT16(Short.SIZE_BYTES),
}

/**
 * Memory of one buffer of the cache, whose rows grow and move.
 *
 * Whatever the layout, it is a number of blocks, each of which has all rows.
 */
internal class CacheBuffer(private val kv: KVBuffer) {
    private val blocks = kv.sizes.take(kv.rowsAxis).product()
    private val rowBytes = kv.sizes.drop(kv.rowsAxis + 1).product() * kv.type.bytes
    private var bytes = direct(0)
    var rows = 0
        private set

    /** The buffer as graphs take it; another one after each [grow]. */
    val tensor: Tensor
        get() {
            val data = if (kv.type == KVType.FLOAT32) bytes.asFloatBuffer() else bytes.asShortBuffer()
            val shape = kv.sizes.mapIndexed { axis, size -> if (axis == kv.rowsAxis) rows.toLong() else size.toLong() }
            return Tensor(data, *shape.toLongArray())
        }

    /** Allocate more rows: the same ones, then zeros. */
    fun grow(rows: Int) {
        val larger = direct(blocks.toLong() * rows * rowBytes)
        for (block in 0 until blocks) part(larger, block, rows, 0, this.rows).put(part(bytes, block, this.rows, 0, this.rows))
        bytes = larger
        this.rows = rows
    }

    /** Move the rows towards row 0. */
    fun moveUp(by: Int) {
        for (block in 0 until blocks) {
            part(bytes, block, rows, 0, rows - by).put(part(bytes, block, rows, by, rows - by)) // as memmove: they may overlap
        }
    }

    /** [count] rows of a block, from row [first] on, of a buffer whose blocks have [rows] rows. */
    private fun part(of: ByteBuffer, block: Int, rows: Int, first: Int, count: Int): ByteBuffer {
        val start = (block * rows + first) * rowBytes
        val view: Buffer = of.duplicate() // ByteBuffer's own methods came with Java 9
        view.limit(start + count * rowBytes)
        view.position(start)
        return (view as ByteBuffer).slice()
    }
}

private fun List<Int>.product() = fold(1) { product, size -> product * size }
