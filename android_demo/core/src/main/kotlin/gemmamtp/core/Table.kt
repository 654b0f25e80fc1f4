package gemmamtp.core

import java.io.File
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.channels.FileChannel

/** A mapping has at most 2 GiB, and a table of per-layer embeddings may have more, so it is mapped in pieces. */
private const val MAX_PIECE_BYTES = 1L shl 30

/** How a number is stored: its bits, and what is subtracted from it. */
private class Encoding(val bits: Int, val zero: Int)

private val ENCODINGS = mapOf(
    "float32" to Encoding(32, 0),
    "int8" to Encoding(8, 0),
    "uint8" to Encoding(8, 128),
    "uint4" to Encoding(4, 8),
    "uint3" to Encoding(3, 4),
    "uint2" to Encoding(2, 2),
)

private val SCALE_BYTES = mapOf("float32" to 4, "float16" to 2, "bfloat16" to 2)

/**
 * An embedding table of a bundle, as FORMAT.md specifies it; only the rows that are asked for are read.
 *
 * @property columns numbers in a row.
 * @throws IllegalArgumentException the encoding or a size is impossible, or the files are too short.
 */
internal class Table(private val bundle: File, private val metadata: TableMetadata) {
    val columns = metadata.columns
    private val encoding =
        requireNotNull(ENCODINGS[metadata.encoding]) { "a table has encoding '${metadata.encoding}', which is none" }
    private val groups: Int
    private val data = MappedRows(bundle, metadata.data.parts, metadata.rowBytes)
    private val scales: MappedRows?

    init {
        require(columns > 0 && metadata.groupSize > 0) { "a table has $columns columns in groups of ${metadata.groupSize}" }
        groups = (columns + metadata.groupSize - 1) / metadata.groupSize
        require(metadata.rowBytes * 8L >= columns.toLong() * encoding.bits) {
            "a table has ${metadata.rowBytes} bytes for $columns numbers in ${metadata.encoding}"
        }
        require(encoding.bits < 32 || metadata.rowBytes % 4 == 0) { "a table of floats has rows of ${metadata.rowBytes} bytes" }
        scales = if (encoding.bits == 32) null else {
            val rows = requireNotNull(metadata.scales) { "a table in ${metadata.encoding} has no scales" }
            val bytes = requireNotNull(SCALE_BYTES[rows.dtype]) { "a table has scales in '${rows.dtype}'" }
            MappedRows(bundle, rows.parts, groups * bytes)
        }
    }

    /**
     * Write the rows of T token ids into a buffer, `[T, columns]` float32.
     *
     * @throws InputError an id is beyond the table; graphs of an intact bundle choose none.
     */
    fun read(ids: List<Int>, into: FloatBuffer) {
        for ((i, id) in ids.withIndex()) read(id, into, i * columns)
    }

    /** Write the row of one token id into a buffer from an index on, as the other [read] does. */
    fun read(id: Int, into: FloatBuffer, start: Int = 0) {
        if (id !in 0 until metadata.rows) {
            throw InputError("$bundle: a table has ${metadata.rows} rows, token $id was chosen; export it again")
        }
        val bytes = data.buffer(id)
        val offset = data.offset(id)
        if (scales == null) {
            for (i in 0 until columns) into.put(start + i, bytes.getFloat(offset + 4 * i))
            return
        }
        val signed = metadata.encoding == "int8"
        val mask = (1 shl encoding.bits) - 1
        for (group in 0 until groups) {
            val scale = scale(scales, id, group)
            for (i in group * metadata.groupSize until minOf(columns, (group + 1) * metadata.groupSize)) {
                // The number may straddle two bytes; the last one of a row never does.
                val bit = i * encoding.bits
                var word = bytes.get(offset + (bit shr 3)).toInt() and 0xff
                if ((bit and 7) + encoding.bits > 8) word = word or ((bytes.get(offset + (bit shr 3) + 1).toInt() and 0xff) shl 8)
                val number = (word ushr (bit and 7)) and mask
                into.put(start + i, (if (signed) number.toByte().toInt() else number - encoding.zero) * scale)
            }
        }
    }

    private fun scale(rows: MappedRows, id: Int, group: Int): Float {
        val bytes = rows.buffer(id)
        val offset = rows.offset(id)
        return when (metadata.scales!!.dtype) {
            "float32" -> bytes.getFloat(offset + 4 * group)
            "bfloat16" -> Float.fromBits(bytes.getShort(offset + 2 * group).toInt() shl 16)
            else -> halfToFloat(bytes.getShort(offset + 2 * group).toInt())
        }
    }
}

/** Convert the 16 bits of an IEEE 754 half-precision number. */
internal fun halfToFloat(bits: Int): Float {
    val magnitude = when (val exponent = (bits shr 10) and 0x1f) {
        0 -> (bits and 0x3ff) * (1f / (1 shl 24))
        31 -> if (bits and 0x3ff == 0) Float.POSITIVE_INFINITY else Float.NaN
        else -> Float.fromBits((exponent + 112 shl 23) or ((bits and 0x3ff) shl 13))
    }
    return if (bits and 0x8000 != 0) -magnitude else magnitude
}

/** Rows of bytes in mapped files; the mapping of each part consists of pieces. */
private class MappedRows(bundle: File, parts: List<Part>, private val rowBytes: Int) {
    private class Piece(val end: Int, val first: Int, val bytes: ByteBuffer)

    private val pieces: List<Piece>

    init {
        val perPiece = if (rowBytes > 0) maxOf(1, (MAX_PIECE_BYTES / rowBytes).toInt()) else 1
        var start = 0
        pieces = parts.flatMap { part ->
            val file = File(bundle, part.file)
            require(rowBytes > 0 && part.offset >= 0 && part.offset + part.rows.toLong() * rowBytes <= file.length()) {
                "${part.file} is too short for a table of ${part.rows} rows of $rowBytes bytes"
            }
            RandomAccessFile(file, "r").use { open ->
                (0 until part.rows step perPiece).map { first ->
                    val count = minOf(perPiece, part.rows - first)
                    val at = part.offset + first.toLong() * rowBytes
                    val bytes = open.channel.map(FileChannel.MapMode.READ_ONLY, at, count.toLong() * rowBytes)
                    Piece(start + count, start, bytes.order(ByteOrder.LITTLE_ENDIAN)).also { start += count }
                }
            }
        }
    }

    private fun piece(row: Int) = if (pieces.size == 1) pieces[0] else pieces.first { row < it.end }

    fun buffer(row: Int): ByteBuffer = piece(row).bytes

    fun offset(row: Int): Int = (row - piece(row).first) * rowBytes
}
