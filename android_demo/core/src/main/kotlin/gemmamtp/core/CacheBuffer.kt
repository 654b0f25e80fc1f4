package gemmamtp.core

import java.nio.Buffer
import java.nio.ByteBuffer

/** Numbers of the cache, as [Tensor.data] holds them: float16 as the bits of shorts. */
public enum class KVType(public val bytes: Int) {
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

    val numBytes get() = bytes.capacity().toLong()

    /** The buffer as graphs take it. */
    val tensor: Tensor
        get() {
            val data = if (kv.type == KVType.FLOAT32) bytes.asFloatBuffer() else bytes.asShortBuffer()
            return Tensor(data, *kv.shape(rows).toLongArray())
        }

    /** Copy [count] rows of another buffer, or of this one, from its row [first] on, to the rows from 0 on. */
    fun copy(from: CacheBuffer, first: Int, count: Int) {
        for (block in 0 until blocks) part(block, 0, count).put(from.part(block, first, count)) // as memmove: they may overlap
    }

    /** Write its first [used] rows, as those of a buffer of [size] rows whose other rows are zeros. */
    fun write(used: Int, size: Int, out: (ByteBuffer) -> Unit) {
        val zeros = ByteBuffer.allocate((size - used) * rowBytes)
        for (block in 0 until blocks) {
            out(part(block, 0, used))
            out(zeros.duplicate())
        }
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
