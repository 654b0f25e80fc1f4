package gemmamtp.core

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** Embeddings in every encoding, packed here as FORMAT.md specifies: bit n is bit n mod 8 of byte n div 8. */
class TableTest {
    private val columns = 11
    private val groupSize = 4

    private fun bytes(numbers: List<Int>, bits: Int, length: Int): ByteArray {
        val row = ByteArray(length)
        for ((i, number) in numbers.withIndex()) {
            for (bit in 0 until bits) {
                val at = i * bits + bit
                if ((number shr bit) and 1 == 1) row[at / 8] = (row[at / 8].toInt() or (1 shl at % 8)).toByte()
            }
        }
        return row
    }

    @Test
    fun everyEncoding() = inTemporaryDirectory { directory ->
        val zeros = mapOf("int8" to 0, "uint8" to 128, "uint4" to 8, "uint3" to 4, "uint2" to 2)
        val scaleBits = mapOf<String, (Float) -> ByteArray>(
            "float32" to { little(4).putFloat(it).array() },
            "bfloat16" to { little(2).putShort((it.toRawBits() ushr 16).toShort()).array() },
            "float16" to { little(2).putShort(half(it)).array() },
        )
        for ((encoding, zero) in zeros) {
            for ((dtype, encode) in scaleBits) {
                val bits = encoding.filter(Char::isDigit).toInt()
                val length = (columns * bits + 7) / 8 + 1 // a row may have bytes beyond its numbers
                val stored = List(3) { row -> List(columns) { (row * 31 + it * 7 + 1) % (1 shl bits) } }
                val scales = List(3) { row -> List(3) { 0.5f * (row + 1) * if (it == 1) -1 else 1 } }
                File(directory, "data").writeBytes(ByteArray(5) + stored.map { bytes(it, bits, length) }.reduce(ByteArray::plus))
                File(directory, "scales").writeBytes(scales.flatten().map(encode).reduce(ByteArray::plus))
                val metadata = TableMetadata(
                    3, columns, length, encoding, groupSize, Rows(listOf(Part("data", 5, 3))), Rows(listOf(Part("scales", 0, 3)), dtype),
                )
                val actual = floats(2 * columns)
                Table(directory, metadata).read(listOf(2, 0), actual)
                for ((i, row) in listOf(2, 0).withIndex()) {
                    for (column in 0 until columns) {
                        val number = stored[row][column]
                        val value = if (encoding == "int8") number.toByte().toInt() else number - zero
                        assertEquals(value * scales[row][column / groupSize], actual.get(i * columns + column), "$encoding $dtype")
                    }
                }
            }
        }
    }

    @Test
    fun rowsInSeveralFiles() = inTemporaryDirectory { directory ->
        for ((name, first, count) in listOf(Triple("a", 0, 2), Triple("b", 2, 1), Triple("c", 3, 4))) {
            val rows = (first until first + count).flatMap { row -> listOf(row + 0.5f, -row.toFloat()) }
            File(directory, name).writeBytes(ByteArray(8) + rows.map { little(4).putFloat(it).array() }.reduce(ByteArray::plus))
        }
        val parts = listOf(Part("a", 8, 2), Part("b", 8, 1), Part("c", 8, 4))
        val actual = floats(8)
        Table(directory, TableMetadata(7, 2, 8, "float32", 2, Rows(parts), null)).read(listOf(6, 1, 2, 3), actual)
        assertEquals(listOf(6.5f, -6f, 1.5f, -1f, 2.5f, -2f, 3.5f, -3f), List(8, actual::get))
    }

    @Test
    fun halfPrecision() {
        for ((bits, value) in listOf(0x3c00 to 1f, 0xc000 to -2f, 0x7bff to 65504f, 1 to 5.9604645e-8f, 0x8000 to -0f, 0x3555 to 0.33325195f)) {
            assertEquals(value, halfToFloat(bits))
        }
        assertTrue(halfToFloat(0x7e00).isNaN() && halfToFloat(0xfc00) == Float.NEGATIVE_INFINITY)
    }

    @Test
    fun impossibleTablesAreRefused() = inTemporaryDirectory { directory ->
        File(directory, "data").writeBytes(ByteArray(40))
        fun table(encoding: String, rows: Int = 2, rowBytes: Int = 20, groupSize: Int = 5) =
            Table(directory, TableMetadata(rows, 5, rowBytes, encoding, groupSize, Rows(listOf(Part("data", 0, rows))), null))
        assertFailsWith<IllegalArgumentException> { table("float64") }
        assertFailsWith<IllegalArgumentException> { table("int8") }
        assertFailsWith<IllegalArgumentException> { table("float32", rows = 3) }
        assertFailsWith<IllegalArgumentException> { table("float32", rowBytes = 16) }
        assertFailsWith<IllegalArgumentException> { table("float32", rowBytes = 0) }
        assertFailsWith<IllegalArgumentException> { table("float32", groupSize = 0) }
        val error = assertFailsWith<InputError> { table("float32").read(listOf(2), floats(5)) }
        assertTrue("has 2 rows, token 2 was chosen" in error.message!!)
    }

    private fun little(size: Int) = ByteBuffer.allocate(size).order(ByteOrder.LITTLE_ENDIAN)

    /** Exact for the few normal numbers used here. */
    private fun half(value: Float): Short {
        val bits = value.toRawBits()
        return (((bits ushr 16) and 0x8000) or ((((bits ushr 23) and 0xff) - 112) shl 10) or ((bits ushr 13) and 0x3ff)).toShort()
    }
}
