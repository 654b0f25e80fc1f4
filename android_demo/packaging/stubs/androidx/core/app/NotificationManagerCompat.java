package androidx.core.app;

import android.content.Context;

public final class NotificationManagerCompat {
    public static final int IMPORTANCE_LOW = 2;

    private NotificationManagerCompat() {}

    public static native NotificationManagerCompat from(Context context);

    public native void createNotificationChannel(NotificationChannelCompat channel);
}
