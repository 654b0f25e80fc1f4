package gemmamtp.core

import java.nio.Buffer
import java.nio.ByteBuffer

/** Numbers of the cache, as [Tensor.data] holds them: float16 as the bits of shorts. */
enum class KVType(val bytes: Int) {
    FLOAT32(Float.SIZE_BYTES),
    FLOAT16(Short.SIZE_BYTES),
}

/**
 * Memory of one buffer of the cache.
 *
 * Whatever the layout, it is a number of blocks, each of which has all rows.
 */
internal class CacheBuffer(private val kv: KVBuffer, val rows: Int, allocate: (Long) -> ByteBuffer) {
    private val blocks = kv.sizes.take(kv.rowsAxis).product()
    private val rowBytes = kv.sizes.drop(kv.rowsAxis + 1).product() * kv.type.bytes
    private val bytes = allocate(blocks.toLong() * rows * rowBytes)

    /** The buffer as graphs take it. */
    val tensor: Tensor
        get() {
            val data = if (kv.type == KVType.FLOAT32) bytes.asFloatBuffer() else bytes.asShortBuffer()
            val shape = kv.sizes.mapIndexed { axis, size -> if (axis == kv.rowsAxis) rows.toLong() else size.toLong() }
            return Tensor(data, *shape.toLongArray())
        }

    /** Copy [count] rows of another buffer, or of this one, from its row [first] on, to the rows from 0 on. */
    fun copy(from: CacheBuffer, first: Int, count: Int) {
        for (block in 0 until blocks) part(block, 0, count).put(from.part(block, first, count)) // as memmove: they may overlap
    }

    /** [count] rows of a block, from row [first] on. */
    private fun part(block: Int, first: Int, count: Int): ByteBuffer {
        val start = (block * rows + first) * rowBytes
        val view: Buffer = bytes.duplicate() // ByteBuffer's own methods came with Java 9
        view.limit(start + count * rowBytes)
        view.position(start)
        return (view as ByteBuffer).slice()
    }
}

private fun List<Int>.product() = fold(1) { product, size -> product * size }
